package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Timestamp;
import io.grpc.Attributes;
import io.grpc.CallCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.SecurityLevel;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Instant;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.BiConsumer;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import tokenbroker.v1.TokenBrokerGrpc;
import tokenbroker.v1.TokenBrokerOuterClass;
import tokenbroker.v1.TokenBrokerOuterClass.IssueTokenRequest;
import tokenbroker.v1.TokenBrokerOuterClass.IssueTokenResponse;
import tokenbroker.v1.TokenBrokerOuterClass.RefreshTokenRequest;
import tokenbroker.v1.TokenBrokerOuterClass.RefreshTokenResponse;
import tokenbroker.v1.TokenBrokerOuterClass.WatchTokenRequest;
import tokenbroker.v1.TokenBrokerOuterClass.WatchTokenResponse;
import tokenbroker.v1.TokenBrokerOuterClass.WhoAmIRequest;
import tokenbroker.v1.TokenBrokerOuterClass.WhoAmIResponse;

/** What the source does at a broker that has no WatchToken yet, or ends it as a test says; it is a resource server, too. */
class OlderBrokerTest {
  private static final Metadata.Key<String> AUTHORIZATION = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  /** The calls that it got: method and authorization. */
  private final List<String> calls = new CopyOnWriteArrayList<>();

  /** In how many seconds the successor of a token is due. */
  private volatile int due = 3600;

  /** Answers the n-th WatchToken; null: there is none. */
  private volatile BiConsumer<Long, StreamObserver<WatchTokenResponse>> watch;

  private volatile StreamObserver<WatchTokenResponse> stream;
  private volatile WatchTokenResponse reported;

  @TempDir private Path dir;
  private Server broker;
  private TokenSource source;

  private final class Older extends TokenBrokerGrpc.TokenBrokerImplBase implements ServerInterceptor {
    @Override
    public void issueToken(IssueTokenRequest request, StreamObserver<IssueTokenResponse> answer) {
      answer.onNext(IssueTokenResponse.newBuilder().setToken(another()).build());
      answer.onCompleted();
    }

    @Override
    public void watchToken(WatchTokenRequest request, StreamObserver<WatchTokenResponse> answer) {
      if (watch == null) {
        super.watchToken(request, answer);
      } else {
        watch.accept(watched(), answer);
      }
    }

    @Override
    public void refreshToken(RefreshTokenRequest request, StreamObserver<RefreshTokenResponse> answer) {
      if (refreshed() < 4) {
        answer.onError(Status.UNAVAILABLE.asRuntimeException());
      } else {
        answer.onNext(RefreshTokenResponse.newBuilder().setToken(another()).build());
        answer.onCompleted();
      }
    }

    @Override
    public void whoAmI(WhoAmIRequest request, StreamObserver<WhoAmIResponse> answer) {
      answer.onNext(WhoAmIResponse.getDefaultInstance());
      answer.onCompleted();
    }

    @Override
    public <Q, R> ServerCall.Listener<Q> interceptCall(ServerCall<Q, R> call, Metadata headers, ServerCallHandler<Q, R> next) {
      calls.add(call.getMethodDescriptor().getBareMethodName() + " " + headers.get(AUTHORIZATION));
      return next.startCall(call, headers);
    }
  }

  private TokenBrokerOuterClass.Token another() {
    var now = Instant.now();
    return TokenBrokerOuterClass.Token.newBuilder().setAccessToken("token " + calls.size()).setTokenType("Bearer").setId("" + calls.size())
        .setIssueTime(time(now.minusSeconds(60))).setRefreshTime(time(now.plusSeconds(due))).setExpireTime(time(now.plusSeconds(7200))).build();
  }

  private WatchTokenResponse next() {
    return WatchTokenResponse.newBuilder().setToken(another()).build();
  }

  private long refreshed() {
    return calls.stream().filter(c -> c.startsWith("RefreshToken ")).count();
  }

  private long watched() {
    return calls.stream().filter(c -> c.startsWith("WatchToken ")).count();
  }

  private static Timestamp time(Instant t) {
    return Timestamp.newBuilder().setSeconds(t.getEpochSecond()).setNanos(t.getNano()).build();
  }

  private String address() {
    return "127.0.0.1:" + broker.getPort();
  }

  @BeforeEach
  void start() throws Exception {
    var older = new Older();
    broker = Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create()).addService(older).intercept(older).build().start();
    Files.writeString(dir.resolve("token"), "first\n");
    source = TokenSource.builder("invoices").address(address()).ca(null).certificate(null, null).tokenFile(dir.resolve("token")).build();
  }

  @AfterEach
  void stop() throws Exception {
    source.close();
    broker.shutdownNow().awaitTermination();
  }

  @Test
  void theTokenIsIssuedAndIssuedAgainWhenThatIsDue() throws Exception {
    due = 1;
    var first = source.token();
    assertEquals("token 2", first.accessToken());
    Files.writeString(dir.resolve("token"), "second");
    Stage.until("a successor", () -> !source.token().equals(first));
    assertTrue(Instant.now().isAfter(first.refreshTime()), "asked again before refresh_time");
    assertEquals(
        List.of("WatchToken Bearer first", "IssueToken Bearer first", "WatchToken Bearer second", "IssueToken Bearer second"),
        calls.subList(0, 4));
  }

  @Test
  void afterAFinalEndItTriesAgainAtRefreshTime() throws Exception {
    due = 1;
    watch = (n, answer) -> {
      answer.onNext(next());
      if (n == 1) {
        due = 3600;
        answer.onError(Status.PERMISSION_DENIED.asRuntimeException());
      }
    };
    var first = source.token();
    Stage.until("a second stream, though nobody asks", () -> watched() == 2);
    assertTrue(Instant.now().isAfter(first.refreshTime()), "asked again before refresh_time");
    Stage.until("its token", () -> !source.token().equals(first));
  }

  @Test
  void aStreamThatStoodForASecondIsNotOpenedAgainAtOnce() throws Exception {
    var times = new CopyOnWriteArrayList<Long>(); // of the start and the end of each stream
    watch = (n, answer) -> {
      times.add(System.nanoTime());
      answer.onNext(next());
      CompletableFuture.delayedExecutor(1100, TimeUnit.MILLISECONDS).execute(() -> {
        times.add(System.nanoTime());
        answer.onCompleted();
      });
    };
    source.token();
    Stage.until("a third stream", () -> times.size() >= 5);
    assertTrue(times.get(2) - times.get(1) > 40e6 && times.get(4) - times.get(3) > 90e6, times::toString);
  }

  @Test
  void aStreamDoesNotBringBackATokenThatWasReported() throws Exception {
    watch = (n, answer) -> {
      if (n == 1) {
        stream = answer;
        reported = next();
        answer.onNext(reported);
      }
    };
    var successor = source.rejected(source.token()).orElseThrow();
    stream.onNext(reported);
    stream.onError(Status.PERMISSION_DENIED.asRuntimeException());
    Stage.until("the next stream, after all that the first one brought", () -> source.token() != null && watched() == 2);
    assertEquals(successor, source.token());
  }

  @Test
  void aReportIsTriedFourTimesByTheServiceConfig() throws Exception {
    var refused = source.token();
    var successors = TokenSourceTest.atOnce(20, () -> source.rejected(refused).orElseThrow().id());
    assertEquals(1, successors.stream().distinct().count(), successors::toString);
    assertEquals(4, refreshed());
  }

  @Test
  void callsOfAStubHaveTheToken() {
    var channel = Grpc.newChannelBuilder(address(), InsecureChannelCredentials.create()).build();
    try {
      TokenBrokerGrpc.newBlockingStub(channel).withCallCredentials(new BearerToken(source)).whoAmI(WhoAmIRequest.getDefaultInstance());
      assertEquals(1, calls.stream().filter("WhoAmI Bearer token 2"::equals).count(), calls::toString);
    } finally {
      channel.shutdownNow();
    }
  }

  @Test
  void aTokenIsNotSentAwayWithoutTls() throws Exception {
    var peer = new InetSocketAddress(InetAddress.getByAddress(new byte[] {(byte) 192, 0, 2, 1}), 443);
    var failure = new AtomicReference<Status>();
    new BearerToken(source).applyRequestMetadata(new CallCredentials.RequestInfo() {
      @Override
      public MethodDescriptor<?, ?> getMethodDescriptor() {
        return TokenBrokerGrpc.getWhoAmIMethod();
      }

      @Override
      public SecurityLevel getSecurityLevel() {
        return SecurityLevel.NONE;
      }

      @Override
      public String getAuthority() {
        return "api.example.com";
      }

      @Override
      public Attributes getTransportAttrs() {
        return Attributes.newBuilder().set(Grpc.TRANSPORT_ATTR_REMOTE_ADDR, peer).build();
      }
    }, Runnable::run, new CallCredentials.MetadataApplier() {
      @Override
      public void apply(Metadata headers) {
        throw new AssertionError("sent " + headers.keys());
      }

      @Override
      public void fail(Status status) {
        failure.set(status);
      }
    });
    assertEquals(Status.Code.UNAUTHENTICATED, failure.get().getCode());
    assertFalse(calls.contains("WatchToken Bearer first"), "the token is asked for in vain");
  }
}
