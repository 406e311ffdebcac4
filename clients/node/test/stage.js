// The stage: what it is asked to do, and what it has seen.
import { setTimeout as sleep } from 'node:timers/promises';

export const URL = process.env.STAGE_URL;

async function ask(method, path) {
  const answer = await fetch(URL + path, { method });
  if (!answer.ok) throw new Error(`${method} ${path}: ${await answer.text()}`);
  return answer.json();
}

export const act = (path) => ask('POST', path);
export const see = (path) => ask('GET', path);

/** Counts the calls of a method from here on. */
export async function calls(method) {
  const total = async () => (await see('/calls'))[method] ?? 0;
  const before = await total();
  return { made: async () => (await total()) - before };
}

/** Polls for something that is to come true, and returns it. */
export async function until(what, true_, patience = 30_000) {
  const end = Date.now() + patience;
  for (;;) {
    const value = await true_();
    if (value) return value;
    if (Date.now() > end) throw new Error(`not within ${patience} ms: ${what}`);
    await sleep(20);
  }
}

export const age = (token) => Date.now() - token.issueTime;
