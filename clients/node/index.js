/**
 * OAuth 2.0 access tokens from Token Broker, always fresh: a TokenSource follows one token over one stream, on which the
 * broker sends each successor before its predecessor ends. index.d.ts describes what is exported.
 */
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect } from 'node:util';

import { Broker } from './broker.js';
import { TokenBrokerError } from './error.js';
import { duration, milliseconds } from './schema.js';

export { TokenBrokerError };

// After these somebody has to act before trying again helps.
const FINAL = new Set(['INVALID_ARGUMENT', 'PERMISSION_DENIED', 'UNAUTHENTICATED', 'FAILED_PRECONDITION']);
// All times are in milliseconds. How old a token must be to be reported, and how long a report that failed holds off the next;
const YOUNG = 10_000;
// and how long a stream must have stood for its end to be no sign of trouble.
const STEADY = 10_000;
// Timers wait no longer; what is due later is looked at once more.
const LONGEST = 24 * 3_600_000;

export class Token {
  #accessToken;

  constructor({ accessToken, tokenType, id, scopes, issueTime, refreshTime, expireTime }) {
    this.#accessToken = accessToken;
    const [issued, refreshed, expires] = [issueTime, refreshTime, expireTime].map((t) => new Date(milliseconds(t)));
    Object.assign(this, { tokenType, id, scopes: Object.freeze(scopes), issueTime: issued, refreshTime: refreshed, expireTime: expires });
    Object.freeze(this);
  }

  get accessToken() { return this.#accessToken; }

  get authorization() { return `${this.tokenType} ${this.#accessToken}`; }

  // Getters are not shown, even if somebody asks for them.
  [inspect.custom](depth, options) { return `Token ${inspect({ ...this }, options)}`; }
}

export class TokenSource {
  #broker;
  #wanted;
  #token;
  #goodUntil = 0;
  #error; // since the token came
  #failures = 0; // attempts that whoever waits is told of
  #streak = 0; // attempts that brought nothing, one after the other
  #following = false; // begins when it is first asked
  #againAt = 0; // when the next attempt is due, by performance.now
  #parked; // an AbortController while that one waits for somebody who asks, or refreshTime
  #report; // for all who report at the same time
  #replaced; // id of the token that was reported
  #quietUntil = 0; // as to reports
  #waiters = new Set();
  #end = new AbortController();

  constructor({ profile, scopes = [], minLifetime = 0, job = '', dedicated = false, ...connection }) {
    this.#broker = new Broker(connection);
    this.#wanted = { profile, scopes };
    if (minLifetime) this.#wanted.minLifetime = duration(minLifetime);
    if (job || dedicated) this.#wanted.job = { id: job, dedicated };
  }

  async token({ timeout = 40_000, signal } = {}) {
    this.#check();
    const atHand = this.#good();
    if (atHand && this.#following && !this.#parked) return atHand;
    if (!this.#following) this.#follow();
    const left = this.#againAt - performance.now();
    if (this.#parked && left <= 0) this.#unpark();
    // The next attempt is too far away: the last failure is the answer.
    const stands = this.#error && left > 0 && (this.#parked || left > timeout);
    const seen = stands ? -1 : this.#failures;
    await this.#until(() => this.#good() || this.#failures !== seen || this.#end.signal.aborted, timeout, signal);
    this.#check();
    const token = this.#good();
    if (token) return token;
    throw this.#error ?? new TokenBrokerError('DEADLINE_EXCEEDED', `the broker has sent no token within ${timeout} ms`);
  }

  async rejected(token) {
    this.#check();
    const current = this.#good();
    if (current && current.id !== token.id) return current;
    this.#report ??= this.#refresh(token).finally(() => { this.#report = undefined; });
    return this.#report;
  }

  async fetch(input, init = {}) {
    const signal = init.signal ?? input.signal;
    const send = (token) => {
      const headers = new Headers(init.headers ?? input.headers);
      headers.set('authorization', token.authorization);
      return fetch(input, { ...init, headers });
    };
    const token = await this.token({ signal });
    const response = await send(token);
    if (response.status !== 401 || isElsewhere(input, response)) return response;
    const successor = await abortable(this.rejected(token), signal).catch((error) => {
      if (error instanceof TokenBrokerError) return undefined; // the 401 says enough
      throw error;
    });
    if (!successor || !isRepeatable(input, init)) return response;
    await response.body?.cancel();
    return send(successor);
  }

  close() {
    this.#end.abort();
    this.#unpark();
    this.#tell();
  }

  #unpark() {
    this.#parked?.abort();
    this.#parked = undefined;
  }

  #check() {
    if (this.#end.signal.aborted) throw new TokenBrokerError('CANCELLED', 'the token source is closed');
  }

  #good() {
    return Date.now() < this.#goodUntil ? this.#token : undefined;
  }

  /** Waits until there is news, or for so long. */
  async #until(news, timeout, signal) {
    signal?.throwIfAborted();
    let waiter;
    let timer;
    const told = new Promise((resolve) => {
      waiter = () => news() && resolve();
      timer = timeout === Infinity ? undefined : setTimeout(resolve, Math.min(timeout, LONGEST));
      this.#waiters.add(waiter);
      waiter();
    });
    try {
      await abortable(told, signal);
    } finally {
      clearTimeout(timer);
      this.#waiters.delete(waiter);
    }
  }

  #tell() {
    for (const waiter of this.#waiters) waiter();
  }

  async #follow() {
    this.#following = true;
    for (let wait = 0; ;) {
      await rest(wait, this.#end.signal);
      if (this.#parked) {
        const due = this.#token ? this.#token.refreshTime - Date.now() : 0;
        await rest(due > 0 ? due : Infinity, this.#parked.signal);
      }
      if (this.#end.signal.aborted) return;
      this.#parked = undefined;
      const stream = {};
      try {
        wait = await this.#attempt(stream);
      } catch (error) {
        wait = this.#failed(TokenBrokerError.of(error), stream);
      }
    }
  }

  /** Takes tokens for as long as the stream brings them. Returns when to go on, if the broker knows no streams. */
  async #attempt(stream) {
    try {
      for await (const { token } of this.#broker.call('WatchToken', this.#wanted, this.#end.signal)) {
        stream.since ??= performance.now();
        this.#take(token);
      }
      throw new TokenBrokerError('UNAVAILABLE', 'the broker has ended the stream');
    } catch (error) {
      if (TokenBrokerError.of(error).code !== 'UNIMPLEMENTED') throw error;
    }
    const before = this.#token?.id;
    const token = await this.#unary('IssueToken', this.#wanted);
    return this.#pause(token.id !== before, Math.max(1000, token.refreshTime - Date.now()));
  }

  async #unary(method, request) {
    for await (const { token } of this.#broker.call(method, request, this.#end.signal)) return this.#take(token);
    throw new TokenBrokerError('UNAVAILABLE', 'the broker has not answered');
  }

  /** Makes a token that the broker has sent the one to use, unless it is one that was reported. */
  #take(message) {
    const token = new Token(message);
    if (token.id !== this.#replaced) {
      this.#token = token;
      this.#goodUntil = token.expireTime - Math.min(10_000, (token.expireTime - token.issueTime) / 10);
      this.#error = undefined;
      this.#tell();
    }
    return token;
  }

  /** Says how long to wait after an attempt. */
  #failed(error, { since }) {
    // A stream that was shorter may have been cut by something that cuts the next one, too.
    const wait = this.#pause(performance.now() - since >= STEADY, error.retryAfter ?? 0);
    this.#againAt = performance.now() + wait;
    if (FINAL.has(error.code)) this.#parked = new AbortController();
    if (error.reason === 'JOB_ENDED') { // the token was revoked
      this.#token = undefined;
      this.#goodUntil = 0;
    }
    if (wait || this.#parked) {
      this.#error = error;
      this.#failures += 1;
      this.#tell();
    }
    return wait;
  }

  #pause(well, least) {
    this.#streak = well ? 0 : Math.min(this.#streak + 1, 10);
    return Math.max(least, well ? 0 : Math.min(30_000, 50 * 2 ** this.#streak) * (0.5 + Math.random() / 2));
  }

  async #refresh(token) {
    if (Date.now() - token.issueTime < YOUNG || performance.now() < this.#quietUntil) return undefined;
    try {
      const successor = await this.#unary('RefreshToken', { ...this.#wanted, rejectedTokenId: token.id });
      this.#replaced = token.id;
      return successor;
    } catch (e) {
      const error = TokenBrokerError.of(e);
      this.#quietUntil = performance.now() + Math.max(error.retryAfter ?? 0, YOUNG);
      if (error.reason === 'REFRESH_TOO_SOON') return undefined;
      throw error;
    }
  }
}

/** Waits for so long, or until the signal. */
async function rest(ms, signal) {
  if (signal.aborted) return;
  if (ms === Infinity) await once(signal, 'abort');
  else await sleep(Math.min(ms, LONGEST), undefined, { signal }).catch(() => {});
}

/** Settles as the promise does, or fails when the signal says so. */
async function abortable(promise, signal) {
  if (!signal) return promise;
  let abort;
  const aborted = new Promise((_, reject) => {
    abort = () => reject(signal.reason);
    signal.addEventListener('abort', abort);
  });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}

/** Whether a redirect has led to a server to which fetch does not show the header: then it is not the token that was refused. */
function isElsewhere(input, response) {
  return response.redirected && new URL(response.url).origin !== new URL(input.url ?? input).origin;
}

function isRepeatable(input, { body }) {
  if (body == null) return !input.body;
  return typeof body === 'string' || body instanceof ArrayBuffer || ArrayBuffer.isView(body)
    || [Blob, FormData, URLSearchParams].some((kind) => body instanceof kind);
}
