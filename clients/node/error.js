import { status } from '@grpc/grpc-js';

import { decode, milliseconds } from './schema.js';

/** The broker's refusal, or the way to the broker that failed. index.d.ts says what it has. */
export class TokenBrokerError extends Error {
  constructor(code, message, { reason = '', metadata = {}, retryAfter } = {}) {
    super(message);
    this.name = 'TokenBrokerError';
    Object.assign(this, { code, reason, metadata, retryAfter });
  }

  /** Makes one of what a call has thrown: a status, or what kept this side from calling. */
  static of(error) {
    if (error instanceof TokenBrokerError) return error;
    if (!error.metadata) return new TokenBrokerError('UNAVAILABLE', `calling the broker: ${error.message}`);
    const more = {};
    try {
      for (const bytes of error.metadata.get('grpc-status-details-bin')) {
        for (const { type_url: url, value } of decode('google.rpc.Status', bytes).details) {
          const name = url.slice(url.lastIndexOf('/') + 1);
          if (name === 'google.rpc.ErrorInfo') Object.assign(more, ofBroker(decode(name, value)));
          if (name === 'google.rpc.RetryInfo') more.retryAfter = milliseconds(decode(name, value).retryDelay);
        }
      }
    } catch {
      // Something on the way has made them up; the code is all there is.
    }
    return new TokenBrokerError(status[error.code], error.details, more);
  }
}

const ofBroker = ({ domain, reason, metadata }) => (domain === 'tokenbroker.v1' ? { reason, metadata } : {});
