package io.github.tokenbroker.client;

import com.google.protobuf.Timestamp;
import java.time.Instant;
import java.util.List;
import tokenbroker.v1.TokenBrokerOuterClass;

/**
 * An access token. It hides itself: {@link #toString} shows its id, which is safe to log.
 *
 * @param accessToken the secret, to be sent as it is
 * @param tokenType how to present it, usually {@code Bearer}
 * @param id the first 16 hexadecimal digits of its SHA-256
 * @param issueTime when it was asked for
 * @param refreshTime when its successor is due
 * @param expireTime when it ends
 * @param scopes what it allows
 */
public record Token(
    String accessToken, String tokenType, String id, Instant issueTime, Instant refreshTime, Instant expireTime, List<String> scopes) {

  static Token of(TokenBrokerOuterClass.Token t) {
    return new Token(t.getAccessToken(), t.getTokenType(), t.getId(), instant(t.getIssueTime()), instant(t.getRefreshTime()),
        instant(t.getExpireTime()), List.copyOf(t.getScopesList()));
  }

  /** Returns the value of the header {@code Authorization}. */
  public String authorization() {
    return tokenType + " " + accessToken;
  }

  /** Tells whether it is good: not within 10 seconds of its end, or a tenth of its life if that is less. */
  boolean good() {
    var end = expireTime.toEpochMilli();
    return System.currentTimeMillis() < end - Math.min(10_000, (end - issueTime.toEpochMilli()) / 10);
  }

  /** Tells whether the broker would call a report of it too soon. */
  boolean young() {
    return Instant.now().isBefore(issueTime.plusSeconds(10));
  }

  @Override
  public String toString() {
    return "Token[id=" + id + ", expireTime=" + expireTime + "]";
  }

  private static Instant instant(Timestamp t) {
    return Instant.ofEpochSecond(t.getSeconds(), t.getNanos());
  }
}
