package io.github.tokenbroker.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/** Why the broker gives no token. Programs act on the {@link #reason}, people read the message. */
public final class TokenBrokerException extends RuntimeException {
  private final Status.Code code;
  private final String reason;
  private final Map<String, String> metadata;
  private final Duration retryAfter;

  private TokenBrokerException(
      String message, Throwable cause, Status.Code code, String reason, Map<String, String> metadata, Duration retryAfter) {
    super(message, cause);
    this.code = code;
    this.reason = reason;
    this.metadata = metadata;
    this.retryAfter = retryAfter;
  }

  TokenBrokerException(Status.Code code, String message) {
    this(message, null, code, "", Map.of(), null);
  }

  /** The same error, for another thread that hears of it. */
  TokenBrokerException(TokenBrokerException e) {
    this(e.getMessage(), e, e.code, e.reason, e.metadata, e.retryAfter);
  }

  /** Reads the status of a call that failed while doing something, and its details. */
  static TokenBrokerException of(String doing, Throwable e) {
    var outcome = Status.fromThrowable(e);
    var status = StatusProto.fromThrowable(e);
    var info = ErrorInfo.getDefaultInstance();
    Duration retryAfter = null;
    try {
      for (Any detail : status == null ? List.<Any>of() : status.getDetailsList()) {
        if (detail.is(ErrorInfo.class) && detail.unpack(ErrorInfo.class).getDomain().equals("tokenbroker.v1")) {
          info = detail.unpack(ErrorInfo.class);
        } else if (detail.is(RetryInfo.class)) {
          var delay = detail.unpack(RetryInfo.class).getRetryDelay();
          retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
        }
      }
    } catch (InvalidProtocolBufferException damaged) {
      e.addSuppressed(damaged);
    }
    var why = outcome.getDescription() != null ? outcome.getDescription() : e.toString();
    var kind = info.getReason().isEmpty() ? outcome.getCode().toString() : info.getReason();
    return new TokenBrokerException(
        doing + ": " + why + " (" + kind + ")", e, outcome.getCode(), info.getReason(), Map.copyOf(info.getMetadataMap()), retryAfter);
  }

  /** The canonical code. */
  public Status.Code code() {
    return code;
  }

  /** One of the broker's reasons, such as {@code CALLER_DENIED}; empty if the error is not the broker's. */
  public String reason() {
    return reason;
  }

  /** What the broker adds, such as {@code profile} and {@code request_id}. */
  public Map<String, String> metadata() {
    return metadata;
  }

  /** How long to wait before asking again; empty if waiting does not help. */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(retryAfter);
  }
}
