// The source, on a real broker.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { copyFileSync, readFileSync, unlinkSync, writeFileSync } from 'node:fs';
import { test } from 'node:test';
import { inspect, promisify } from 'node:util';

import { TokenBrokerError, TokenSource } from 'token-broker';

import * as stage from './stage.js';
import { act, age, calls, see, until } from './stage.js';

const times = (n, f) => Array.from({ length: n }, f);

/** A source that is closed after the test. */
function open(t, options = {}) {
  const source = new TokenSource({ profile: 'invoices', ...options });
  t.after(() => source.close());
  return source;
}

async function refusal(source, options) {
  const error = await source.token(options).then(() => assert.fail('a token came'), (e) => e);
  assert.ok(error instanceof TokenBrokerError, inspect(error));
  return error;
}

test('a million questions cost one call', async (t) => {
  const [watched, issued] = [await calls('WatchToken'), await calls('IssueToken')];
  const source = open(t);
  const first = await Promise.all(times(100, () => source.token()));
  assert.equal(new Set(first).size, 1);
  const [token] = first;
  assert.equal(token.authorization, `Bearer ${token.accessToken}`);
  assert.equal(token.expireTime - token.issueTime, 3_600_000);
  const began = performance.now();
  for (let i = 0; i < 1_000_000; i += 1) await source.token();
  t.diagnostic(`1,000,000 token() in ${((performance.now() - began) / 1000).toFixed(2)} s`);
  assert.equal(await source.token(), token);
  assert.deepEqual([await watched.made(), await issued.made()], [1, 0]);
});

test('the successor of a revoked token comes by itself', async (t) => {
  const source = open(t);
  const first = await source.token();
  const { token_id: revoked } = await act('/revoke');
  assert.equal(first.id, revoked);
  await until('a successor', async () => (await source.token()).id !== revoked);
});

test('nothing shows the token', async (t) => {
  const source = open(t);
  const token = await source.token();
  const all = { showHidden: true, getters: true, depth: Infinity };
  for (const shown of [inspect(token), inspect(token, all), JSON.stringify(token), String(token), inspect(source, all), inspect({ token }, all)]) {
    assert.ok(!shown.includes(token.accessToken), 'the token is shown');
  }
  assert.match(inspect(token), new RegExp(token.id));
});

test('a program that closes its source ends by itself', async () => {
  const program = `import { TokenSource } from 'token-broker';
    const source = new TokenSource({ profile: 'invoices' });
    console.log((await source.token()).id);
    source.close();
    await source.token().catch((e) => console.log(e.code, process.getActiveResourcesInfo().filter((r) => r === 'Timeout').length));`;
  const options = { timeout: 20_000, cwd: import.meta.dirname ?? new URL('.', import.meta.url).pathname };
  const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '-e', program], options);
  assert.match(stdout, /^[0-9a-f]{16}\nCANCELLED 0\n$/);
});

test('the service config is the published one', () => {
  const config = (path) => JSON.parse(readFileSync(new URL(path, import.meta.url), 'utf8'));
  assert.deepEqual(config('../service_config.json'), config('../../service_config.json'));
});

test('the broker may go and come', async (t) => {
  const source = open(t);
  const first = await source.token();
  for (const end of ['/broker/stop', '/broker/kill']) {
    await act(end);
    for (let i = 0; i < 1000; i += 1) assert.ok((await source.token({ timeout: 0 })).id);
    const watched = await calls('WatchToken');
    await act('/broker/start');
    await until('the stream is back', watched.made);
    const { token_id: revoked } = await act('/revoke');
    await until('a successor', async () => ![first.id, revoked].includes((await source.token()).id));
  }
});

test('who has no token hears that the broker is away, and gets one when it is back', async (t) => {
  const source = open(t);
  await act('/broker/stop');
  try {
    const error = await refusal(source);
    assert.deepEqual([error.code, error.reason, error.retryAfter], ['UNAVAILABLE', '', undefined]);
  } finally {
    await act('/broker/start');
  }
  await until('a token', () => source.token().catch(() => undefined));
});

test('new certificates are used when the stream comes back', async (t) => {
  const source = open(t);
  await source.token();
  try {
    await act('/broker/stop');
    await act('/certificate?as=worker2');
    const [watched, before] = [await calls('WatchToken'), (await see('/callers')).length];
    await act('/broker/start');
    await until('the stream is back', watched.made);
    const { token_id: revoked } = await act('/revoke');
    await until('a successor', async () => (await source.token()).id !== revoked);
    source.close(); // a stream is in the audit log when it has ended
    const since = async () => (await see('/callers')).slice(before);
    await until('the new identity', async () => (await since()).includes('spiffe://clients.test/worker2'));
    assert.ok(!(await since()).includes('spiffe://clients.test/worker'));
  } finally {
    await act('/certificate?as=worker');
  }
});

test('files that were good are used while they are not', async (t) => {
  t.after(() => act('/certificate?as=worker'));
  const { BROKER_CERTIFICATE: certificate } = process.env;
  const ca = `${certificate}.ca`;
  copyFileSync(process.env.BROKER_CA, ca);
  await open(t, { ca }).token();
  const was = [certificate, ca].map((path) => readFileSync(path));
  const spoils = {
    missing: () => unlinkSync(certificate),
    'half written': () => writeFileSync(certificate, was[0].subarray(0, -40)),
    'no authority': () => writeFileSync(ca, ''),
    'of another pair': async () => { await act('/certificate?as=worker2'); writeFileSync(certificate, was[0]); },
  };
  for (const [name, spoil] of Object.entries(spoils)) {
    await t.test(name, async () => {
      await act('/broker/stop');
      await spoil();
      const watched = await calls('WatchToken');
      await act('/broker/start');
      await until('the stream is back', watched.made);
      writeFileSync(certificate, was[0]);
      writeFileSync(ca, was[1]);
    });
  }
});

test('a denial comes at once and is not hammered', async (t) => {
  const watched = await calls('WatchToken');
  const source = open(t, { profile: 'secret' });
  const began = performance.now();
  const error = await refusal(source);
  assert.ok(performance.now() - began < 2000);
  assert.deepEqual([error.code, error.reason, error.retryAfter], ['PERMISSION_DENIED', 'CALLER_DENIED', undefined]);
  assert.deepEqual([error.metadata.caller, error.metadata.profile], ['spiffe://clients.test/worker', 'secret']);
  await until('3 s of asking', async () => {
    assert.equal((await refusal(source)).reason, 'CALLER_DENIED');
    return performance.now() - began > 3000;
  });
  const made = await watched.made(); // after 0.1 + 0.2 + 0.4 + 0.8 + 1.6 s, and half of that at the least
  assert.ok(made >= 2 && made < 8, `${made} calls`);
});

test('a throttled profile says when to ask again', async (t) => {
  const watched = await calls('WatchToken');
  const source = open(t, { profile: 'throttled' });
  const error = await refusal(source);
  assert.deepEqual([error.code, error.reason], ['RESOURCE_EXHAUSTED', 'ENDPOINT_THROTTLED']);
  assert.ok(error.retryAfter > 20_000 && error.retryAfter <= 31_000, `${error.retryAfter} ms`);
  assert.equal((await refusal(source, { timeout: 500 })).reason, 'ENDPOINT_THROTTLED');
  assert.equal(await watched.made(), 1);
});

test('a token is served while it is good though the right is gone', async (t) => {
  const source = open(t);
  const first = await source.token();
  const watched = await calls('WatchToken');
  try {
    await act('/policy?allow=false');
    await until('the source has been told', async () => {
      assert.equal((await source.token({ timeout: 0 })).id, first.id);
      return watched.made();
    });
    assert.equal((await refusal(open(t))).reason, 'CALLER_DENIED');
  } finally {
    await act('/policy?allow=true');
  }
  await until('a stream that brings successors, once somebody asks', async () => {
    await act('/revoke');
    return (await source.token({ timeout: 0 })).id !== first.id;
  });
});

test('settings that cannot be', () => {
  assert.throws(() => new TokenSource({ profile: 'invoices', certificate: '' }), TypeError);
});

test('files that are missing', async (t) => {
  const error = await refusal(open(t, { ca: '/nowhere/ca.crt' }));
  assert.equal(error.code, 'UNAVAILABLE');
  assert.match(error.message, /\/nowhere\/ca\.crt/);
});

test('who gives up takes nothing from others', async (t) => {
  const source = open(t);
  const giveUp = new AbortController();
  const [impatient, patient] = [source.token({ signal: giveUp.signal }), source.token()];
  giveUp.abort();
  await assert.rejects(impatient, { name: 'AbortError' });
  assert.ok((await patient).id);
});

test('closing wakes who waits', async (t) => {
  const source = open(t, { profile: 'throttled' });
  await refusal(source);
  const waiting = source.token();
  source.close();
  await assert.rejects(waiting, { code: 'CANCELLED' });
});

test('rejected tokens', async (t) => {
  t.after(() => act('/resource/refuse?tokens=none'));
  const resource = `${stage.URL}/resource`;
  const source = open(t);
  const refused = async () => (await see('/resource/calls')).refused;
  const old = ['report1', 'report2', 'report3'].map((profile) => open(t, { profile }));
  const ages = () => Promise.all(old.map(async (s) => age(await s.token())));

  await t.test('a young one is not reported, and the 401 stands', async () => {
    const { token_id: revoked } = await act('/revoke');
    const young = await until('a successor', async () => ((token) => token.id !== revoked && token)(await source.token()));
    assert.ok(age(young) < 9000);
    const refreshed = await calls('RefreshToken');
    await act('/resource/refuse?tokens=all');
    const before = await refused();
    assert.equal(await source.rejected(young), undefined);
    assert.equal((await source.fetch(resource)).status, 401);
    assert.deepEqual([await refreshed.made(), (await refused()) - before], [0, 1]);
  });

  await t.test('20 requests meet a resource that refuses everything', async () => {
    await until('tokens of 10 s', async () => Math.min(...(await ages())) > 10_200);
    const source = old[0];
    const token = await source.token();
    const [refreshed, before] = [await calls('RefreshToken'), await refused()];
    const answers = await Promise.all(times(20, () => source.fetch(resource)));
    assert.deepEqual(answers.map((a) => a.status), Array(20).fill(401));
    assert.deepEqual([await refreshed.made(), (await refused()) - before], [1, 40]);
    assert.equal((await source.rejected(token)).id, (await source.token()).id); // had without a call
    assert.equal(await refreshed.made(), 1);
  });

  await t.test('20 requests with a token that is refused', async () => {
    const source = old[1];
    await act('/resource/refuse?tokens=none');
    assert.equal((await source.fetch(resource)).status, 200);
    await act('/resource/refuse?tokens=seen');
    const refreshed = await calls('RefreshToken');
    const bodies = ['12345', Buffer.from('12345'), new Blob(['12345']), new URLSearchParams('a=345')];
    const answers = await Promise.all(times(20, (_, i) => source.fetch(new URL(resource), { method: 'POST', body: bodies[i % 4] })));
    assert.deepEqual(answers.map((a) => a.status), Array(20).fill(200));
    for (const answer of answers) assert.equal((await answer.json()).body_length, 5);
    assert.equal(await refreshed.made(), 1);
  });

  await t.test('a body that cannot be sent again', async () => {
    const source = old[2];
    const token = await source.token();
    await act('/resource/refuse?tokens=all');
    const before = await refused();
    const streamed = () => new Blob(['123']).stream();
    const answer = await source.fetch(resource, { method: 'POST', body: streamed(), duplex: 'half' });
    assert.equal(answer.status, 401);
    const request = new Request(resource, { method: 'POST', body: streamed(), duplex: 'half' });
    assert.equal((await source.fetch(request)).status, 401);
    assert.equal((await refused()) - before, 2);
    assert.notEqual((await source.token()).id, token.id);
  });
});
