/** Which token a source follows, where the broker is, and who calls. */
export interface TokenSourceOptions {
  /** The profile's name. */
  profile: string;
  /** A subset of the profile's scopes. Default: all. */
  scopes?: string[];
  /** How long each token must still live when it comes, in milliseconds. */
  minLifetime?: number;
  /** The job on whose behalf the token is needed. */
  job?: string;
  /** Asks for a token of the job's own. */
  dedicated?: boolean;
  /** host:port or unix:/path. Default: BROKER_ADDRESS, or 127.0.0.1:7443. */
  address?: string;
  /** PEM file with the CA certificates that the broker's is checked against. Default: BROKER_CA, or the system's. */
  ca?: string;
  /** PEM file with the client certificate. Default: BROKER_CERTIFICATE. */
  certificate?: string;
  /** PEM file with its private key. Default: BROKER_PRIVATE_KEY. */
  privateKey?: string;
  /** File with a bearer token, read for each call. Default: BROKER_TOKEN_FILE. */
  tokenFile?: string;
}

/** An access token. Neither console.log nor JSON.stringify shows it; its id may be logged. */
export class Token {
  private constructor();
  get accessToken(): string;
  /** The value of the header Authorization. */
  get authorization(): string;
  readonly tokenType: string;
  readonly id: string;
  readonly scopes: readonly string[];
  readonly issueTime: Date;
  readonly refreshTime: Date;
  readonly expireTime: Date;
}

/** The broker's refusal, or the way to the broker that failed. */
export class TokenBrokerError extends Error {
  private constructor();
  /** The canonical code, such as "PERMISSION_DENIED". */
  readonly code: string;
  /** The broker's reason (docs/errors.md), by which programs decide; empty if the error is not the broker's. */
  readonly reason: string;
  /** request_id, profile and the like. */
  readonly metadata: Readonly<Record<string, string>>;
  /** In how many milliseconds trying again helps; undefined if nothing says that it does. */
  readonly retryAfter: number | undefined;
}

/** Follows one token. It begins when it is first asked. Until close() its stream keeps the process running. */
export class TokenSource {
  /** Throws TypeError if the options contradict each other. */
  constructor(options: TokenSourceOptions);

  /**
   * Returns a token that is good now, from memory if there is one. Else it waits for the broker, timeout (in milliseconds;
   * default: 40,000) at most. Rejects with TokenBrokerError if the broker refuses, cannot get one, or cannot be reached.
   */
  token(options?: { timeout?: number; signal?: AbortSignal }): Promise<Token>;

  /**
   * Reports that a resource server has answered 401 to a token, and returns its successor. Undefined if there is none: the
   * token is too young to be reported, or one has been reported a moment ago. Then the 401 stands. Rejects with
   * TokenBrokerError if the broker has no other.
   */
  rejected(token: Token): Promise<Token | undefined>;

  /**
   * Does what the global fetch does, with the token. What gets 401 is sent once more, with the token's successor, if there
   * is one and the body can be sent again; then the answer is the caller's, whatever it is.
   */
  fetch(...args: Parameters<typeof globalThis.fetch>): Promise<Response>;

  /** Ends the stream. Whoever waits gets an error. */
  close(): void;
}
