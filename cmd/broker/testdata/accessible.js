() => {
  const wrong = [], all = (selector) => [...document.querySelectorAll(selector)];
  const check = (ok, what, e) => ok || wrong.push(what + (e ? ": " + e.outerHTML.slice(0, 120) : ""));
  const seen = (e) => e.checkVisibility() && !e.closest(".hidden, .skip, thead") && e.getBoundingClientRect().width > 1;

  check(document.documentElement.lang, "no language");
  check(document.title, "no title");
  check(all("main").length === 1, "not one main");
  check(all("h1").length === 1, "not one h1");
  let level = 0;
  for (const h of all("h1, h2, h3, h4, h5, h6")) {
    check(+h.tagName[1] <= level + 1, "a heading is skipped", h);
    level = +h.tagName[1];
  }
  const ids = all("[id]").map((e) => e.id);
  check(new Set(ids).size === ids.length, "an id is there twice");
  for (const e of all("[aria-labelledby], [aria-describedby]"))
    for (const id of (e.getAttribute("aria-labelledby") ?? e.getAttribute("aria-describedby")).split(" ")) check(ids.includes(id), "refers to nothing", e);
  for (const e of all("input:not([type=hidden]), select, textarea")) check([...e.labels].some((l) => l.textContent.trim()), "no label", e);
  for (const e of all("a, button, summary")) check(e.textContent.trim() || e.ariaLabel, "no name", e);
  for (const e of all("img")) check(e.hasAttribute("alt"), "no alternative", e);
  for (const e of all("table")) check(e.caption?.textContent.trim(), "no caption", e);
  for (const e of all("th")) check(e.scope, "no scope", e);
  for (const e of all("[tabindex]")) check(e.tabIndex <= 0, "an order of its own", e);
  const names = all("main a, main button").filter(seen).map((e) => e.textContent.trim());
  check(new Set(names).size === names.length, "two links or buttons of one name: " + names);

  // 2.5.8: 24 px at least, but for links in a sentence.
  for (const e of all("button, .button, input:not([type=hidden]), select").filter(seen)) {
    const r = e.getBoundingClientRect();
    check(r.height >= 24 && r.width >= 24, `${r.width}x${r.height} is hard to hit`, e);
  }

  // 1.4.3: 4.5 to 1, and 3 to 1 for large text.
  const color = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  for (const e of all("body *").filter((e) => seen(e) && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))) {
    let back = canvas;
    for (let on = e; on; on = on.parentElement) {
      const c = color(getComputedStyle(on).backgroundColor);
      if (c[3] !== 0) {
        back = c;
        break;
      }
    }
    const style = getComputedStyle(e), a = light(color(style.color)), b = light(back);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    check(ratio >= (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5), `contrast ${ratio.toFixed(2)}`, e);
  }

  // 1.4.10: nothing to scroll sideways.
  check(document.documentElement.scrollWidth <= innerWidth, `${document.documentElement.scrollWidth} px wide on ${innerWidth}`);
  return wrong;
}
