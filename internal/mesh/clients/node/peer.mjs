// A caller of the broker on grpc-js: prints what it saw as a line of JSON.
//
// PROTO_PATH has the directories of the schema and of what it imports.
import { readFileSync } from 'node:fs';
import { setTimeout } from 'node:timers/promises';

import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';
import protobuf from 'protobufjs';

// grpc-js leaves the details of errors to its users: google/rpc/status.proto and error_details.proto, as far as needed.
const { root } = protobuf.parse(`syntax = "proto3"; package google.rpc;
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Any { string type_url = 1; bytes value = 2; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message RetryInfo { Duration retry_delay = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }`, { keepCase: true });
const decode = (type, bytes) => { const t = root.lookupType(`google.rpc.${type}`); return t.toObject(t.decode(bytes), { longs: Number }); };

const env = process.env;
const loaded = await loader.load('tokenbroker/v1/token_broker.proto',
  { keepCase: true, enums: String, longs: Number, defaults: true, includeDirs: env.PROTO_PATH.split(':') });
const { TokenBroker } = grpc.loadPackageDefinition(loaded).tokenbroker.v1;
const read = (name) => readFileSync(env[name]);
const client = new TokenBroker(
  env.BROKER_ADDRESS,
  grpc.credentials.createSsl(read('BROKER_CA'), read('BROKER_PRIVATE_KEY'), read('BROKER_CERTIFICATE')),
  // Common, and as eager as the broker allows: a ping every 10 s, without calls, too.
  { 'grpc.keepalive_time_ms': 10_000, 'grpc.keepalive_permit_without_calls': 1 },
);
const call = (method, request) => new Promise((resolve, reject) => {
  client[method](request, { deadline: Date.now() + 30_000 }, (error, response) => (error ? reject(error) : resolve(response)));
});

// What a call that must fail says, details and all.
async function failure(profile) {
  const error = await call('IssueToken', { profile }).then(() => { throw new Error(`a token for ${profile} was issued`); }, (e) => e);
  const seen = { code: grpc.status[error.code] };
  for (const { type_url, value } of decode('Status', error.metadata.get('grpc-status-details-bin')[0]).details) {
    if (type_url.endsWith('/google.rpc.ErrorInfo')) {
      const { domain, reason, metadata } = decode('ErrorInfo', value);
      Object.assign(seen, { domain, reason, request_id: metadata.request_id });
    } else if (type_url.endsWith('/google.rpc.RetryInfo')) {
      const { seconds = 0, nanos = 0 } = decode('RetryInfo', value).retry_delay;
      seen.retry_seconds = seconds + nanos / 1e9;
    }
  }
  return seen;
}

const me = await call('WhoAmI', {});
const { token } = await call('IssueToken', { profile: 'invoices' });
const seen = {
  caller: me.caller, proof: me.proof, token_id: token.id, token_type: token.token_type,
  denied: await failure('secret'), throttled: await failure('throttled'),
};
await setTimeout(Number(env.IDLE_SECONDS) * 1000);
seen.token_id_after_idling = (await call('IssueToken', { profile: 'invoices' })).token.id;
console.log(JSON.stringify(seen));
client.close();
