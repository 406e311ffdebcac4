package io.github.tokenbroker.client;

import com.google.protobuf.Timestamp;
import java.time.Duration;
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

  private static final Duration MARGIN = Duration.ofSeconds(10);

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
    var tenth = Duration.between(issueTime, expireTime).dividedBy(10);
    return Instant.now().isBefore(expireTime.minus(tenth.compareTo(MARGIN) < 0 ? tenth : MARGIN));
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
