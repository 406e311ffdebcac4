// The third-party authorization server, set up for the tests: oidc-provider as it comes, with the features that are
// tested switched on, and a record of what it was asked.
//
// It reads its settings from standard input, JSON:
//
//   clients    their metadata, in the words of RFC 7591, and lasting_refresh_tokens: they can be used many times
//   lifetime   of access tokens, in seconds
//   tls        PEM: certificate and key of the server, ca of the clients' certificates
//
// writes one line to standard output once it listens, JSON, with its two issuers, http and https, and mutual, the address
// that the latter names for clients with a certificate (mtls_endpoint_aliases). It serves until it is killed.
//
//   GET  /_calls   what came to the token and the revocation endpoint so far, see the struct call of the tests
//   POST /_hold    no answer to the next token request, however long its client lives: ?act=true acts on it first

import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import * as http from 'node:http';
import * as https from 'node:https';

import Provider, { errors } from 'oidc-provider';

const settings = JSON.parse(readFileSync(0, 'utf8'));
const calls = [];
let hold;

// What the broker calls the id of a token.
const id = (token) => token && createHash('sha256').update(token).digest('hex').slice(0, 16);

// How the client proves itself, as the request shows it.
function authentication(ctx, body) {
  if (ctx.get('authorization')) return ctx.get('authorization').split(' ')[0].toLowerCase() === 'basic' ? 'client_secret_basic' : 'unknown';
  if (body.client_secret) return 'client_secret_post';
  if (body.client_assertion) return 'private_key_jwt';
  return ctx.socket.authorized ? 'tls_client_auth' : 'none';
}

const standard = new Set([
  'client_assertion', 'client_assertion_type', 'client_id', 'client_secret', 'code', 'code_verifier', 'grant_type',
  'redirect_uri', 'refresh_token', 'resource', 'scope', 'token', 'token_type_hint',
]);

function record(ctx, body) {
  const call = {
    time: Date.now(),
    endpoint: ctx.path === '/token' ? 'token' : 'revocation',
    host: ctx.host,
    authentication: authentication(ctx, body),
    grant: body.grant_type,
    scope: body.scope,
    resource: [body.resource ?? []].flat(),
    extra: Object.fromEntries(Object.entries(body).filter(([name]) => !standard.has(name))),
    presented: id(body.refresh_token ?? body.token),
  };
  calls.push(call);
  return call;
}

async function watch(ctx, next) {
  if (ctx.path === '/_calls') {
    ctx.body = calls;
    return;
  }
  if (ctx.path === '/_hold') {
    hold = { act: ctx.query.act === 'true' };
    ctx.status = 204;
    return;
  }
  if (ctx.path !== '/token' && ctx.path !== '/token/revocation') {
    await next();
    return;
  }
  const held = ctx.path === '/token' ? hold : undefined;
  if (held) hold = undefined;
  const gone = held && new Promise((resolve) => { ctx.socket.once('close', resolve); });
  let call;
  if (!held || held.act) {
    await next();
    call = record(ctx, ctx.oidc.body ?? {});
    Object.assign(call, {
      client: ctx.oidc.client?.clientId,
      status: ctx.status,
      error: ctx.body?.error,
      detail: ctx.body?.error_description,
      access: id(ctx.body?.access_token),
      refresh: id(ctx.body?.refresh_token),
      revoked: ctx.state.revoked,
    });
  } else {
    let text = '';
    for await (const chunk of ctx.req) text += chunk;
    call = record(ctx, Object.fromEntries(new URLSearchParams(text)));
  }
  if (held) {
    call.held = true;
    await gone;
  }
}

const certificate = (ctx) => ctx.socket.getPeerX509Certificate?.();

// An authorization server under this issuer. The clients' certificates are for the issuer that has aliases.
function provider(issuer, aliases) {
  const p = new Provider(issuer, {
    clients: settings.clients,
    clientAuthMethods: ['client_secret_basic', 'client_secret_post', 'private_key_jwt', 'tls_client_auth'],
    cookies: { keys: ['of a test'] },
    discovery: { mtls_endpoint_aliases: aliases },
    extraClientMetadata: { properties: ['lasting_refresh_tokens'] },
    // By default a client with a secret may use a refresh token many times.
    rotateRefreshToken: (ctx) => !ctx.oidc.client.lasting_refresh_tokens,
    scopes: ['openid', 'offline_access', 'read', 'write'],
    ttl: { AccessToken: settings.lifetime, ClientCredentials: settings.lifetime },
    features: {
      clientCredentials: { enabled: true },
      introspection: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo(ctx, resource) {
          if (!resource.startsWith('https://api.')) throw new errors.InvalidTarget();
          return { scope: 'read write', accessTokenTTL: settings.lifetime };
        },
      },
      mTLS: {
        enabled: true,
        tlsClientAuth: true,
        getCertificate: certificate,
        certificateAuthorized: (ctx) => ctx.socket.authorized,
        certificateSubjectMatches(ctx, property, expected) {
          if (property !== 'tls_client_auth_san_dns') throw new Error(`no test uses ${property}`);
          return certificate(ctx).subjectAltName?.split(', ').includes(`DNS:${expected}`) ?? false;
        },
      },
    },
  });
  p.use(watch);
  p.on('grant.revoked', (ctx) => { ctx.state.revoked = true; });
  p.on('server_error', (ctx, err) => console.error(err));
  return p.callback();
}

// Listens on a free port of loopback. Who answers is known later, because an issuer must know its own address.
async function listen(server) {
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return `${server instanceof https.Server ? 'https' : 'http'}://127.0.0.1:${server.address().port}`;
}

const { certificate: cert, key, ca } = settings.tls;
const servers = [
  http.createServer(),
  https.createServer({ cert, key }),
  https.createServer({ cert, key, ca, requestCert: true, rejectUnauthorized: false }),
];
const [plain, secure, mutual] = await Promise.all(servers.map(listen));
const answer = provider(secure, {
  token_endpoint: `${mutual}/token`,
  revocation_endpoint: `${mutual}/token/revocation`,
  introspection_endpoint: `${mutual}/token/introspection`,
});
servers[0].on('request', provider(plain));
servers[1].on('request', answer);
servers[2].on('request', answer);
console.log(JSON.stringify({ http: plain, https: secure, mutual }));
