// Compiled, never run: the types of what users write.
import { Token, TokenBrokerError, TokenSource, type TokenSourceOptions } from 'token-broker';

const options: TokenSourceOptions = { profile: 'invoices', scopes: ['a'], minLifetime: 60_000, job: 'nightly', dedicated: true };
const source = new TokenSource(options);
const token: Token = await source.token({ timeout: 1000, signal: AbortSignal.timeout(500) });
const header: string = token.authorization;
const response: Response = await source.fetch(new URL('https://api.example'), { method: 'POST', body: header });
const successor: Token | undefined = await source.rejected(token);
try {
  await source.token();
} catch (error) {
  if (error instanceof TokenBrokerError && error.code === 'PERMISSION_DENIED') {
    console.log(error.reason, error.metadata['request_id'], error.retryAfter?.toFixed());
  }
}
// @ts-expect-error a profile is required
new TokenSource({});
// @ts-expect-error nobody makes tokens
new Token();
// @ts-expect-error tokens do not change
token.id = `${response.status} ${successor?.expireTime.getTime()}`;
source.close();
