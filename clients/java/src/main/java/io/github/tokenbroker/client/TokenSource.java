package io.github.tokenbroker.client;

import com.google.common.util.concurrent.ListenableFuture;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.Status.Code;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import java.util.EnumSet;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import tokenbroker.v1.TokenBrokerGrpc;
import tokenbroker.v1.TokenBrokerOuterClass.IssueTokenRequest;
import tokenbroker.v1.TokenBrokerOuterClass.Job;
import tokenbroker.v1.TokenBrokerOuterClass.RefreshTokenRequest;
import tokenbroker.v1.TokenBrokerOuterClass.RefreshTokenResponse;
import tokenbroker.v1.TokenBrokerOuterClass.WatchTokenRequest;

/**
 * Follows one token of the broker, from each to its successor. Its first use connects; from then on asking for the token is
 * a look into memory, and goes on working while the broker is away and the token is good. It is for any number of threads,
 * and as a rule lives as long as the program.
 */
public final class TokenSource implements AutoCloseable {
  private static final Duration PATIENCE = Duration.ofSeconds(40);
  private static final Duration FIRST_WAIT = Duration.ofMillis(100);
  private static final Duration LONGEST_WAIT = Duration.ofSeconds(30);
  /** How long a stream must have stood for its end to be no sign of trouble. */
  private static final Duration STEADY = Duration.ofSeconds(10);
  /** How long a report that failed holds off the next, at least. */
  private static final Duration QUIET = Duration.ofSeconds(10);
  /** A broker that has no streams is not asked more often. */
  private static final Duration OFTEN = Duration.ofSeconds(1);
  private static final EnumSet<Code> FINAL =
      EnumSet.of(Code.INVALID_ARGUMENT, Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.FAILED_PRECONDITION);

  private final WatchTokenRequest request;
  private final ManagedChannel channel;
  private final TokenBrokerGrpc.TokenBrokerBlockingStub blocking;
  private final TokenBrokerGrpc.TokenBrokerFutureStub future;
  private final Thread follower;
  /** Whether the stream has brought a token; the follower's own. */
  private boolean brought;

  // This guards all below, and those who wait are told through it. What is volatile is looked at without.
  private volatile Token token;
  /** The next attempt is due at {@link #again}, and then waits for somebody who asks if this says so. */
  private volatile boolean parked;
  private long again;
  private boolean closed;
  /** How many attempts have failed, and how the last one did; null after one that brought a token. */
  private long failures;
  private TokenBrokerException failure;
  /** The last report, and when the next one may be made if it is done. */
  private CompletableFuture<Optional<Token>> report = CompletableFuture.completedFuture(Optional.empty());
  private long reportable = System.nanoTime();
  /** The id of the token that was reported. */
  private String replaced = "";

  private TokenSource(WatchTokenRequest request, Connection connection) {
    this.request = request;
    channel = connection.open();
    var bearer = connection.bearer();
    blocking = TokenBrokerGrpc.newBlockingStub(channel).withCallCredentials(bearer);
    future = TokenBrokerGrpc.newFutureStub(channel).withCallCredentials(bearer);
    follower = new Thread(this::follow, "token-broker " + request.getProfile());
    follower.setDaemon(true);
  }

  /** Returns a source for all that a profile allows, at the broker that the environment names. */
  public static TokenSource of(String profile) {
    return builder(profile).build();
  }

  /** Returns what makes a source that is not like that in all. */
  public static Builder builder(String profile) {
    return new Builder(profile);
  }

  /** Returns the token, and waits for it up to 40 seconds if none is at hand. */
  public Token token() {
    return token(PATIENCE);
  }

  /**
   * Returns the token, and waits for it if none is at hand.
   *
   * @throws TokenBrokerException if there is none: with the broker's error, or DEADLINE_EXCEEDED
   */
  public Token token(Duration timeout) {
    var t = token;
    return t != null && !parked && t.good() ? t : await(timeout);
  }

  private synchronized Token await(Duration timeout) {
    if (closed) {
      throw new IllegalStateException("the token source is closed");
    }
    if (follower.getState() == Thread.State.NEW) {
      follower.start();
    }
    var before = failures;
    var end = System.nanoTime() + timeout.toNanos();
    if (failure != null && again - System.nanoTime() > 0) {
      before -= parked || again - end > 0 ? 1 : 0; // the next attempt is too far away: the last failure is the answer
    } else if (parked) {
      parked = false;
      notifyAll();
    }
    while (token == null || !token.good()) {
      var left = end - System.nanoTime();
      if (closed) {
        throw new IllegalStateException("the token source is closed");
      } else if (failure != null && (failures != before || left <= 0)) {
        throw new TokenBrokerException(failure);
      } else if (left <= 0) {
        throw new TokenBrokerException(Code.DEADLINE_EXCEEDED, doing() + ": no good token has come within " + timeout);
      }
      try {
        TimeUnit.NANOSECONDS.timedWait(this, left);
      } catch (InterruptedException e) {
        Thread.currentThread().interrupt();
        throw new TokenBrokerException(Code.CANCELLED, doing() + ": interrupted");
      }
    }
    return token;
  }

  /**
   * Reports that a resource server has answered 401 to a token: to the broker once, however many report the same.
   *
   * @return the successor; empty if the token is so young that another one would hardly fare better
   * @throws TokenBrokerException if the broker gives none
   */
  public Optional<Token> rejected(Token rejected) {
    CompletableFuture<Optional<Token>> awaited;
    synchronized (this) {
      if (token != null && !token.id().equals(rejected.id()) && token.good()) {
        return Optional.of(token);
      }
      if (report.isDone() && System.nanoTime() - reportable >= 0) {
        if (closed || rejected.young()) {
          return Optional.empty();
        }
        report = new CompletableFuture<>();
        Context.ROOT.run(() -> report(rejected)); // it is everybody's: it does not end with the call that made it
      }
      awaited = report;
    }
    try {
      return awaited.get();
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
      throw new TokenBrokerException(Code.CANCELLED, "reporting a token: interrupted");
    } catch (ExecutionException e) {
      throw new TokenBrokerException((TokenBrokerException) e.getCause());
    }
  }

  private void report(Token rejected) {
    var refresh = RefreshTokenRequest.newBuilder().setProfile(request.getProfile()).addAllScopes(request.getScopesList())
        .setMinLifetime(request.getMinLifetime()).setRejectedTokenId(rejected.id());
    if (request.hasJob()) {
      refresh.setJob(request.getJob());
    }
    var call = future.refreshToken(refresh.build());
    call.addListener(() -> reported(rejected, call), Runnable::run);
  }

  private void reported(Token rejected, ListenableFuture<RefreshTokenResponse> call) {
    Token successor = null;
    TokenBrokerException e = null;
    try {
      successor = Token.of(call.get().getToken());
    } catch (ExecutionException | InterruptedException | RuntimeException failed) {
      e = TokenBrokerException.of("reporting token " + rejected.id() + " of profile " + request.getProfile(), failed);
    }
    synchronized (this) {
      if (e != null) {
        reportable = System.nanoTime() + max(e.retryAfter().orElse(QUIET), QUIET).toNanos();
      } else {
        replaced = rejected.id();
        if (token != null && token.good() && !token.id().equals(replaced)) {
          successor = token; // the stream was faster
        } else {
          take(successor);
        }
      }
      if (e == null || e.reason().equals("REFRESH_TOO_SOON")) {
        report.complete(Optional.ofNullable(successor));
      } else {
        report.completeExceptionally(e);
      }
    }
  }

  /** Ends the stream and the connection. Whoever asks after that gets IllegalStateException. */
  @Override
  public void close() {
    synchronized (this) {
      closed = true;
      token = null;
      notifyAll();
    }
    channel.shutdownNow();
    try {
      follower.join();
      channel.awaitTermination(10, TimeUnit.SECONDS);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }

  /** Shows no token. */
  @Override
  public String toString() {
    return "TokenSource[profile=" + request.getProfile() + "]";
  }

  private String doing() {
    return "watching the token of profile " + request.getProfile();
  }

  private synchronized void take(Token successor) {
    // A replica that has not heard of a report may still send what was reported.
    if (!closed && !successor.id().equals(replaced)) {
      token = successor;
      failure = null;
      notifyAll();
    }
  }

  /** Attempts, each with a stream, until the source is closed. */
  private void follow() {
    var tries = 0;
    Duration pause;
    TokenBrokerException e;
    do {
      var began = System.nanoTime();
      brought = false;
      e = attempt();
      var stood = brought && System.nanoTime() - began >= STEADY.toNanos();
      tries = stood || e == null ? 0 : tries;
      if (e == null) {
        pause = max(refreshDue(), OFTEN);
      } else {
        var atOnce = stood && !FINAL.contains(e.code());
        pause = max(atOnce ? Duration.ZERO : backOff(tries++), e.retryAfter().orElse(Duration.ZERO));
        channel.enterIdle(); // the next attempt connects anew, and at once
      }
    } while (rest(pause, e));
  }

  /** In how long the successor of the token at hand is due; zero or less if it has been, or there is no token. */
  private Duration refreshDue() {
    var now = token;
    return now == null ? Duration.ZERO : Duration.between(Instant.now(), now.refreshTime());
  }

  /** Returns why the stream has ended, or null if there are no streams and a call has brought the token. */
  private TokenBrokerException attempt() {
    try {
      blocking.watchToken(request).forEachRemaining(next -> {
        take(Token.of(next.getToken()));
        brought = true;
      });
      return new TokenBrokerException(Code.UNAVAILABLE, doing() + ": the stream has ended");
    } catch (RuntimeException e) {
      if (Status.fromThrowable(e).getCode() != Code.UNIMPLEMENTED) {
        return TokenBrokerException.of(doing(), e);
      }
    }
    try {
      var issue = IssueTokenRequest.newBuilder().setProfile(request.getProfile()).addAllScopes(request.getScopesList())
          .setMinLifetime(request.getMinLifetime());
      if (request.hasJob()) {
        issue.setJob(request.getJob());
      }
      take(Token.of(blocking.issueToken(issue.build()).getToken()));
      return null;
    } catch (RuntimeException e) {
      return TokenBrokerException.of("requesting a token for profile " + request.getProfile(), e);
    }
  }

  /** Waits before the next attempt, and tells who waits for a token how the last one ended. False when closed. */
  private synchronized boolean rest(Duration pause, TokenBrokerException e) {
    again = System.nanoTime() + pause.toNanos();
    if (e != null && e.reason().equals("JOB_ENDED")) {
      token = null; // it was revoked
    }
    if (e != null && !pause.isZero()) {
      failure = e;
      failures++;
      parked = FINAL.contains(e.code());
      notifyAll();
    }
    try {
      for (long left = pause.toNanos(); !closed && left > 0; left = again - System.nanoTime()) {
        TimeUnit.NANOSECONDS.timedWait(this, left);
      }
      var due = refreshDue().toNanos();
      var end = System.nanoTime() + due;
      for (var left = due; !closed && parked && (due <= 0 || left > 0); left = end - System.nanoTime()) {
        TimeUnit.NANOSECONDS.timedWait(this, due <= 0 ? Long.MAX_VALUE : left);
      }
      parked = false;
      return !closed;
    } catch (InterruptedException nobodyDoes) {
      return false;
    }
  }

  private static Duration backOff(int attempt) {
    var whole = Math.min(LONGEST_WAIT.toNanos(), FIRST_WAIT.toNanos() << Math.min(attempt, 10));
    return Duration.ofNanos(whole / 2 + ThreadLocalRandom.current().nextLong(whole / 2));
  }

  private static Duration max(Duration a, Duration b) {
    return a.compareTo(b) < 0 ? b : a;
  }

  /** What to follow, and where. What is not set comes from the environment: {@code BROKER_ADDRESS} and so on. */
  public static final class Builder {
    private final WatchTokenRequest.Builder request = WatchTokenRequest.newBuilder();
    private String address = environment("BROKER_ADDRESS").orElse("127.0.0.1:7443");
    private Path ca = environment("BROKER_CA").map(Path::of).orElse(null);
    private Path certificate = environment("BROKER_CERTIFICATE").map(Path::of).orElse(null);
    private Path privateKey = environment("BROKER_PRIVATE_KEY").map(Path::of).orElse(null);
    private Path tokenFile = environment("BROKER_TOKEN_FILE").map(Path::of).orElse(null);

    private Builder(String profile) {
      request.setProfile(profile);
    }

    private static Optional<String> environment(String variable) {
      return Optional.ofNullable(System.getenv(variable)).filter(v -> !v.isEmpty());
    }

    /** The broker: {@code host:port}, or {@code unix:/path}. */
    public Builder address(String address) {
      this.address = address;
      return this;
    }

    /** Certificates that the broker's is checked against, a PEM file. Default: the system's. */
    public Builder ca(Path file) {
      ca = file;
      return this;
    }

    /** The client certificate and its private key (PKCS #8), PEM files; read for each connection. */
    public Builder certificate(Path certificate, Path privateKey) {
      this.certificate = certificate;
      this.privateKey = privateKey;
      return this;
    }

    /** A file with a bearer token that says who calls; read for each call. */
    public Builder tokenFile(Path file) {
      tokenFile = file;
      return this;
    }

    /** Some of the profile's scopes. Default: all. */
    public Builder scopes(List<String> scopes) {
      request.clearScopes().addAllScopes(scopes);
      return this;
    }

    /** How long each token must still live when it comes. */
    public Builder minLifetime(Duration lifetime) {
      request.setMinLifetime(com.google.protobuf.Duration.newBuilder().setSeconds(lifetime.getSeconds()).setNanos(lifetime.getNano()));
      return this;
    }

    /** The job on whose behalf the token is needed, and whether it gets one of its own. */
    public Builder job(String id, boolean dedicated) {
      request.setJob(Job.newBuilder().setId(id).setDedicated(dedicated));
      return this;
    }

    /** @throws IllegalArgumentException if a file is missing or damaged */
    public TokenSource build() {
      return new TokenSource(request.build(), new Connection(address, ca, certificate, privateKey, tokenFile));
    }
  }
}
