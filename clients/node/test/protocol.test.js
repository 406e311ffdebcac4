// The source, on a broker that does what a real one seldom does.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { mock, test } from 'node:test';

import grpc from '@grpc/grpc-js';
import { TokenBrokerError, TokenSource } from 'token-broker';

import { decode, duration, encode } from '../schema.js';
import { until } from './stage.js';


/** A token that lives for some milliseconds more. */
function made(id, { life = 3_600_000, age = 60_000, refresh = life } = {}) {
  const now = Date.now();
  const times = { issueTime: duration(now - age), refreshTime: duration(now + refresh), expireTime: duration(now + life) };
  return { token: { accessToken: `secret of ${id}`, tokenType: 'Bearer', id, ...times } };
}

function refusal(code, reason, retry) {
  const any = (type, message) => ({ type_url: `type.googleapis.com/google.rpc.${type}`, value: encode(`google.rpc.${type}`, message) });
  const details = [any('ErrorInfo', { reason, domain: 'tokenbroker.v1' })];
  if (retry) details.push(any('RetryInfo', { retryDelay: duration(retry) }));
  const metadata = new grpc.Metadata();
  metadata.set('grpc-status-details-bin', encode('google.rpc.Status', { code, message: 'refused', details }));
  return { code, details: 'refused', metadata };
}

/** A server that answers by functions named after the methods, and what it has been asked. */
async function serve(t, methods) {
  const asked = [];
  const server = new grpc.Server();
  const definition = {};
  const handlers = {};
  for (const [name, answer] of Object.entries(methods)) {
    definition[name] = {
      path: `/tokenbroker.v1.TokenBroker/${name}`,
      requestStream: false,
      responseStream: name === 'WatchToken',
      requestDeserialize: (bytes) => decode(`tokenbroker.v1.${name}Request`, bytes),
      responseSerialize: (message) => encode(`tokenbroker.v1.${name}Response`, message),
    };
    handlers[name] = (call, callback) => {
      asked.push({ name, at: performance.now(), request: call.request, authorization: call.metadata.get('authorization') });
      answer({ n: asked.filter((a) => a.name === name).length, call, callback });
    };
  }
  server.addService(definition, handlers);
  const credentials = grpc.ServerCredentials.createInsecure();
  const port = await new Promise((resolve, reject) => {
    server.bindAsync('127.0.0.1:0', credentials, (error, p) => (error ? reject(error) : resolve(p)));
  });
  t.after(() => server.forceShutdown());
  const open = (options) => {
    const plain = { address: `127.0.0.1:${port}`, ca: '', certificate: '', privateKey: '' };
    const source = new TokenSource({ profile: 'invoices', ...plain, ...options });
    t.after(() => source.close());
    return source;
  };
  return { open, asked, count: (name) => asked.filter((a) => a.name === name).length };
}

const streams = (...names) => ({ n, call }) => call.write(made(names[Math.min(n, names.length) - 1]));

test('the request says what is wanted', async (t) => {
  const broker = await serve(t, { WatchToken: streams('a') });
  await broker.open({ scopes: ['x', 'y'], minLifetime: 90_500, job: 'nightly', dedicated: true }).token();
  const { profile, scopes, minLifetime, job } = broker.asked[0].request;
  assert.deepEqual({ profile, scopes, minLifetime, job }, {
    profile: 'invoices', scopes: ['x', 'y'], minLifetime: { seconds: 90, nanos: 5e8 }, job: { id: 'nightly', dedicated: true },
  });
});

test('a bearer token is read for each call', async (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'token-broker-'));
  t.after(() => rmSync(directory, { recursive: true }));
  const tokenFile = join(directory, 'token');
  const broker = await serve(t, { WatchToken: streams('a'), RefreshToken: ({ callback }) => callback(null, made('b')) });
  const source = broker.open({ tokenFile });
  writeFileSync(tokenFile, 'two words\n');
  await assert.rejects(source.token(), (e) => e.message.includes(tokenFile) && !e.message.includes('words'));
  writeFileSync(tokenFile, 'first\n');
  const token = await source.token();
  writeFileSync(tokenFile, 'other\n');
  await source.rejected(token);
  assert.deepEqual(broker.asked.map((a) => a.authorization), [['Bearer first'], ['Bearer other']]);
});

test('a broker that cannot be watched is asked at refresh time', async (t) => {
  const broker = await serve(t, { IssueToken: ({ n, callback }) => callback(null, made('abcdef'[n - 1], { refresh: 500 })) });
  const source = broker.open();
  assert.equal((await source.token()).id, 'a');
  await until('a successor', async () => (await source.token()).id === 'b');
  assert.ok(broker.asked[1].at - broker.asked[0].at > 450);
});

test('the margin is a tenth of a short life, and ten seconds of a long one', async (t) => {
  t.after(() => mock.restoreAll());
  for (const [life, margin] of [[20_000, 2000], [3_600_000, 10_000]]) {
    const broker = await serve(t, { WatchToken: ({ call }) => call.write(made('a', { life, age: 0 })) });
    const source = broker.open();
    const { id, expireTime } = await source.token();
    const clock = mock.method(Date, 'now', () => expireTime - margin - 100);
    assert.equal((await source.token({ timeout: 0 })).id, id);
    clock.mock.mockImplementation(() => expireTime - margin + 100);
    await assert.rejects(source.token({ timeout: 0 }), { code: 'DEADLINE_EXCEEDED' });
    clock.mock.restore();
  }
});

test('an attempt waits as long as RetryInfo says', async (t) => {
  const watch = ({ n, call }) => (n === 1 ? call.emit('error', refusal(grpc.status.UNAVAILABLE, 'ENDPOINT_UNAVAILABLE', 700)) : call.write(made('a')));
  const broker = await serve(t, { WatchToken: watch });
  const source = broker.open();
  await assert.rejects(source.token(), { code: 'UNAVAILABLE', reason: 'ENDPOINT_UNAVAILABLE', retryAfter: 700 });
  assert.equal((await source.token()).id, 'a');
  assert.ok(broker.asked[1].at - broker.asked[0].at > 690);
});

test('a report that came too soon is not repeated', async (t) => {
  const refresh = ({ callback }) => callback(refusal(grpc.status.RESOURCE_EXHAUSTED, 'REFRESH_TOO_SOON', 20_000));
  const broker = await serve(t, { WatchToken: streams('a'), RefreshToken: refresh });
  const source = broker.open();
  const token = await source.token();
  for (let i = 0; i < 5; i += 1) assert.equal(await source.rejected(token), undefined);
  assert.equal(broker.count('RefreshToken'), 1);
});

test('a report that fails leaves the 401 to the caller', async (t) => {
  const refresh = ({ callback }) => callback(refusal(grpc.status.PERMISSION_DENIED, 'CALLER_DENIED'));
  const broker = await serve(t, { WatchToken: streams('a'), RefreshToken: refresh });
  const source = broker.open();
  await assert.rejects(source.rejected(await source.token()), (e) => e instanceof TokenBrokerError && e.reason === 'CALLER_DENIED');
  assert.equal(await source.rejected(await source.token()), undefined);
  assert.equal(broker.count('RefreshToken'), 1);
});

test('unary calls are tried again by grpc as the service config says', async (t) => {
  const refresh = ({ n, callback }) => (n < 3 ? callback(refusal(grpc.status.UNAVAILABLE, '')) : callback(null, made('b')));
  const broker = await serve(t, { WatchToken: streams('a'), RefreshToken: refresh });
  const source = broker.open();
  assert.equal((await source.rejected(await source.token())).id, 'b');
  assert.equal(broker.count('RefreshToken'), 3);
});

test('a stream does not bring back a token that was reported', async (t) => {
  let stream;
  const watch = ({ n, call }) => {
    if (n > 1) return;
    stream = call;
    call.write(made('a'));
  };
  const broker = await serve(t, { WatchToken: watch, RefreshToken: ({ callback }) => callback(null, made('b')) });
  const source = broker.open();
  await source.rejected(await source.token());
  stream.write(made('a'));
  stream.emit('error', refusal(grpc.status.PERMISSION_DENIED, ''));
  await until('the next stream, after all that the first one brought', async () => (await source.token()) && broker.count('WatchToken') === 2);
  assert.equal((await source.token()).id, 'b');
});

test('streams that end at once are not opened in a loop', async (t) => {
  const broker = await serve(t, { WatchToken: ({ call }) => { call.write(made('a')); call.end(); } });
  const source = broker.open();
  await source.token();
  const end = performance.now() + 1000;
  await until('a second', async () => (await source.token()) && performance.now() > end);
  const made_ = broker.asked.length; // after 0.1 + 0.2 + 0.4 s, and half of that at the least
  assert.ok(made_ >= 2 && made_ < 7, `${made_} calls`);
});

test('a stream that stood for a second is not opened again at once', async (t) => {
  const ends = [];
  const watch = ({ call }) => {
    call.write(made('a'));
    setTimeout(() => { ends.push(performance.now()); call.end(); }, 1100);
  };
  const broker = await serve(t, { WatchToken: watch });
  await broker.open().token();
  await until('a third stream', () => broker.asked.length === 3);
  [50, 100].forEach((wait, i) => assert.ok(broker.asked[i + 1].at - ends[i] > wait - 10));
});

test('a stream that stood for long is opened again at once', async (t) => {
  const now = performance.now.bind(performance);
  let later = 0;
  t.after(() => mock.restoreAll());
  mock.method(performance, 'now', () => now() + later);
  mock.method(Math, 'random', () => 1); // waits are as long as can be
  const watch = ({ n, call }) => {
    call.write(made('a'));
    if (n < 7) setTimeout(() => { later += 10_000; call.end(); }, 200);
  };
  const broker = await serve(t, { WatchToken: watch });
  const began = Date.now();
  await broker.open().token();
  await until('a seventh stream', () => broker.asked.length === 7);
  assert.ok(Date.now() - began < 6000, 'the waits would be 0.1 + 0.2 + … + 3.2 s');
});

test('after a final end it tries again at refresh time', async (t) => {
  const watch = ({ n, call }) => {
    call.write(made('ab'[n - 1], { refresh: 1000 * n ** 9 }));
    if (n === 1) call.emit('error', refusal(grpc.status.PERMISSION_DENIED, 'CALLER_DENIED'));
  };
  const broker = await serve(t, { WatchToken: watch });
  const source = broker.open();
  await source.token();
  await until('a second stream, though nobody asks', () => broker.asked.length === 2);
  assert.ok(broker.asked[1].at - broker.asked[0].at > 900);
  await until('its token', async () => (await source.token()).id === 'b');
});

test('after a final end who asks once the wait is over waits for the attempt', async (t) => {
  const watch = ({ n, call }) => {
    if (n === 1) call.emit('error', refusal(grpc.status.PERMISSION_DENIED, 'CALLER_DENIED', 500));
    else setTimeout(() => call.write(made('a')), 300);
  };
  const broker = await serve(t, { WatchToken: watch });
  const source = broker.open();
  for (let i = 0; i < 3; i += 1) await assert.rejects(source.token(), { reason: 'CALLER_DENIED' });
  await new Promise((resolve) => { setTimeout(resolve, 600); }); // in which nothing may happen
  assert.equal(broker.asked.length, 1);
  assert.equal((await source.token()).id, 'a');
});

test('the token of a job that has ended is of no use', async (t) => {
  let end;
  const watch = ({ n, call }) => {
    end = () => call.emit('error', refusal(grpc.status.FAILED_PRECONDITION, 'JOB_ENDED'));
    if (n === 1) call.write(made('a'));
    else end();
  };
  const source = (await serve(t, { WatchToken: watch })).open({ job: 'nightly', dedicated: true });
  await source.token();
  end();
  await until('an error', () => source.token().then(() => false, (error) => error.reason === 'JOB_ENDED'));
});

test('who has less time than the next attempt is away gets the last error at once', async (t) => {
  const watch = ({ call }) => call.emit('error', refusal(grpc.status.UNAVAILABLE, 'ENDPOINT_UNAVAILABLE', 60_000));
  const broker = await serve(t, { WatchToken: watch });
  const [source, began] = [broker.open(), performance.now()];
  for (let i = 0; i < 3; i += 1) await assert.rejects(source.token(), { reason: 'ENDPOINT_UNAVAILABLE' });
  assert.ok(performance.now() - began < 20_000);
  assert.equal(broker.asked.length, 1);
});

test('a 401 of a server that was not shown the token is not reported', async (t) => {
  const broker = await serve(t, { WatchToken: streams('a'), RefreshToken: ({ callback }) => callback(null, made('b')) });
  const source = broker.open();
  const shown = [];
  const listen = async (answer) => {
    const server = createServer((request, response) => {
      shown.push(request.headers.authorization);
      answer(request, response);
    });
    t.after(() => server.close());
    await once(server.listen(0, '127.0.0.1'), 'listening');
    return `http://127.0.0.1:${server.address().port}`;
  };
  const other = await listen((_, response) => response.writeHead(401).end());
  const api = await listen(({ url }, response) => (url === '/' ? response.writeHead(401).end() : response.writeHead(302, { location: other }).end()));
  assert.equal((await source.fetch(`${api}/elsewhere`)).status, 401);
  assert.deepEqual([shown, broker.count('RefreshToken')], [['Bearer secret of a', undefined], 0]);
  assert.equal((await source.fetch(new Request(api, { headers: { 'x-mine': '1' } }))).status, 401);
  assert.deepEqual([shown.slice(2), broker.count('RefreshToken')], [['Bearer secret of a', 'Bearer secret of b'], 1]);
});

test('details that nobody understands', async (t) => {
  const metadata = new grpc.Metadata();
  metadata.set('grpc-status-details-bin', Buffer.from([255, 255]));
  const broker = await serve(t, { WatchToken: ({ call }) => call.emit('error', { code: grpc.status.PERMISSION_DENIED, details: 'no', metadata }) });
  await assert.rejects(broker.open().token(), { code: 'PERMISSION_DENIED', reason: '', message: 'no' });
});

test('closing ends every connection', async (t) => {
  const broker = await serve(t, { WatchToken: streams('a'), RefreshToken: () => {} });
  const sockets = () => process.getActiveResourcesInfo().filter((r) => r === 'TCPSocketWrap').length;
  const before = sockets();
  const sources = Array.from({ length: 20 }, () => broker.open());
  const tokens = await Promise.all(sources.map((source) => source.token()));
  const report = sources[0].rejected(tokens[0]);
  await until('a report', () => broker.count('RefreshToken'));
  assert.ok(sockets() >= before + 20);
  for (const source of sources) source.close();
  await assert.rejects(report, { code: 'CANCELLED' });
  await until('no more connections than before', () => sockets() <= before);
});
