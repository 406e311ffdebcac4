// Brings the page up to date every ten seconds, and says which states have
// changed. Without it the page is as complete; it only stands still.
"use strict";

const pause = document.getElementById("pause");
const changes = document.getElementById("changes");
pause.parentElement.hidden = false;
let paused = false;
pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", String(paused));
});

const states = (root) => new Map([...root.querySelectorAll("[data-state]")].map((e) => [e.dataset.state, e.textContent.trim()]));

async function update() {
  if (paused || document.hidden) return;
  const answer = await fetch(location.href, { cache: "no-store", redirect: "error" });
  if (!answer.ok) throw new Error(answer.status);
  const next = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (paused) return;
  const before = states(document), focus = document.activeElement?.id;
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = next.getElementById(part.id);
    if (fresh) part.replaceChildren(...fresh.childNodes);
  }
  if (focus && document.activeElement?.id !== focus) document.getElementById(focus)?.focus({ preventScroll: true });
  const changed = [...states(document)].filter(([name, word]) => before.has(name) && before.get(name) !== word);
  if (changed.length) changes.textContent = changed.map(([name, word]) => `${name}: ${word}`).join("; ");
}

let failed = false;
setInterval(() => update().then(() => {
  if (failed) changes.textContent = "";
  failed = false;
}, () => {
  if (!failed) changes.textContent = "This page is not up to date: the console does not answer. Load it again.";
  failed = true;
}), 10_000);
