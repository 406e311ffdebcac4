import { readFile } from 'node:fs/promises';
import net from 'node:net';
import { createSecureContext } from 'node:tls';

import { Client, Metadata, credentials } from '@grpc/grpc-js';

import { decode, encode, read } from './schema.js';

const OPTIONS = {
  'grpc.service_config': read('service_config.json'),
  'grpc.service_config_disable_resolution': 1, // what DNS might say
  // A dead connection is noticed within a minute, also while nothing is sent.
  'grpc.keepalive_time_ms': 30_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc.enable_http_proxy': 0,
  // Nothing is left over from earlier attempts, such as their back-off: the source has its own.
  'grpc.use_local_subchannel_pool': 1,
  'grpc.primary_user_agent': 'token-broker-node',
};

/** Where the broker is, and who calls. What is not given is read from the environment. */
export class Broker {
  #files;
  #good; // what the files of TLS held when they last were good
  #plain;
  #target;

  constructor({ address, ca, certificate, privateKey, tokenFile }) {
    const { env } = process;
    address ??= env.BROKER_ADDRESS ?? '127.0.0.1:7443';
    this.#files = {
      ca: ca ?? env.BROKER_CA,
      certificate: certificate ?? env.BROKER_CERTIFICATE,
      privateKey: privateKey ?? env.BROKER_PRIVATE_KEY,
      token: tokenFile ?? env.BROKER_TOKEN_FILE,
    };
    const files = this.#files;
    this.#plain = !files.ca && !files.certificate && !files.privateKey && isLocal(address);
    this.#target = address.startsWith('unix:') ? address : `dns:///${address}`;
    if (!files.certificate !== !files.privateKey) {
      throw new TypeError('certificate and privateKey go together: set both, or neither');
    }
  }

  /**
   * Calls a method, over a connection of its own that is made with the files as they are now or last were good, and yields what the broker
   * sends until the signal ends it. A unary method is one that sends a single message.
   */
  async *call(name, request, signal) {
    const metadata = await this.#metadata();
    const client = new Client(this.#target, await this.#credentials(), OPTIONS);
    const method = `/tokenbroker.v1.TokenBroker/${name}`;
    const stream = client.makeServerStreamRequest(
      method,
      (object) => encode(`tokenbroker.v1.${name}Request`, object),
      (bytes) => decode(`tokenbroker.v1.${name}Response`, bytes),
      request,
      metadata,
    );
    const cancel = () => stream.cancel();
    stream.on('error', () => {}); // also when nobody reads any more
    signal.addEventListener('abort', cancel);
    try {
      if (!signal.aborted) yield* stream;
    } finally {
      signal.removeEventListener('abort', cancel);
      cancel();
      client.close();
    }
  }

  async #credentials() {
    if (this.#plain) return credentials.createInsecure();
    try {
      this.#good = await this.#pems();
    } catch (error) {
      if (!this.#good) throw error;
    }
    return credentials.createSsl(...this.#good);
  }

  /** Reads the files of TLS, and has OpenSSL check them. */
  async #pems() {
    const paths = [this.#files.ca, this.#files.privateKey, this.#files.certificate];
    const pems = await Promise.all(paths.map((path) => (path ? readFile(path) : null)));
    pems.forEach((pem, i) => {
      const count = (edge) => pem.toString('latin1').split(`-----${edge} `).length - 1;
      if (pem && (count('BEGIN') === 0 || count('BEGIN') !== count('END'))) throw new Error(`${paths[i]} is not a whole PEM file`);
    });
    const [ca, key, cert] = pems;
    try {
      createSecureContext({ ca: ca ?? undefined, key: key ?? undefined, cert: cert ?? undefined });
    } catch (error) {
      throw new Error(`${paths.filter(Boolean).join(', ')}: ${error.message}`);
    }
    return pems;
  }

  async #metadata() {
    const metadata = new Metadata();
    const { token: file } = this.#files;
    if (file) {
      const token = (await readFile(file, 'latin1')).replace(/\r?\n$/, '');
      if (!/^[!-~]+$/.test(token)) throw new Error(`${file} does not hold one token and nothing else`);
      metadata.set('authorization', `Bearer ${token}`);
    }
    return metadata;
  }
}

function isLocal(address) {
  if (address.startsWith('unix:')) return true;
  const host = address.slice(0, Math.max(0, address.lastIndexOf(':'))).replace(/^\[(.*)\]$/, '$1').toLowerCase();
  return host === 'localhost' || host === '::1' || (net.isIPv4(host.replace(/^::ffff:/, '')) && /^(::ffff:)?127\./.test(host));
}
