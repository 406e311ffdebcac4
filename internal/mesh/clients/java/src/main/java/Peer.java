import com.google.gson.Gson;
import com.google.protobuf.util.Durations;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.StatusProto;
import java.io.File;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import tokenbroker.v1.TokenBrokerGrpc;
import tokenbroker.v1.TokenBrokerOuterClass.IssueTokenRequest;
import tokenbroker.v1.TokenBrokerOuterClass.Token;
import tokenbroker.v1.TokenBrokerOuterClass.WhoAmIRequest;

/** A caller of the broker on grpc-java: prints what it saw as a line of JSON. */
public final class Peer {
  private final TokenBrokerGrpc.TokenBrokerBlockingStub broker;

  private Peer(ManagedChannel channel) {
    broker = TokenBrokerGrpc.newBlockingStub(channel);
  }

  private Token issue(String profile) {
    var request = IssueTokenRequest.newBuilder().setProfile(profile).build();
    return broker.withDeadlineAfter(30, TimeUnit.SECONDS).issueToken(request).getToken();
  }

  /** What a call that must fail says, details and all. */
  private Map<String, Object> failure(String profile) throws Exception {
    try {
      issue(profile);
    } catch (StatusRuntimeException e) {
      var seen = new LinkedHashMap<String, Object>(Map.of("code", e.getStatus().getCode().name()));
      for (var detail : StatusProto.fromThrowable(e).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          var info = detail.unpack(ErrorInfo.class);
          seen.putAll(Map.of("domain", info.getDomain(), "reason", info.getReason(), "request_id", info.getMetadataOrThrow("request_id")));
        } else if (detail.is(RetryInfo.class)) {
          seen.put("retry_seconds", Durations.toMillis(detail.unpack(RetryInfo.class).getRetryDelay()) / 1e3);
        }
      }
      return seen;
    }
    throw new IllegalStateException("a token for " + profile + " was issued");
  }

  public static void main(String[] args) throws Exception {
    var env = System.getenv();
    var credentials = TlsChannelCredentials.newBuilder()
        .trustManager(new File(env.get("BROKER_CA")))
        .keyManager(new File(env.get("BROKER_CERTIFICATE")), new File(env.get("BROKER_PRIVATE_KEY")))
        .build();
    // Common, and as eager as the broker allows: a ping every 10 s, without calls, too.
    var channel = NettyChannelBuilder.forTarget(env.get("BROKER_ADDRESS"), credentials)
        .keepAliveTime(10, TimeUnit.SECONDS).keepAliveWithoutCalls(true).build();
    var peer = new Peer(channel);
    var me = peer.broker.withDeadlineAfter(30, TimeUnit.SECONDS).whoAmI(WhoAmIRequest.getDefaultInstance());
    var token = peer.issue("invoices");
    var seen = new LinkedHashMap<String, Object>();
    seen.put("caller", me.getCaller());
    seen.put("proof", me.getProof().name());
    seen.put("token_id", token.getId());
    seen.put("token_type", token.getTokenType());
    seen.put("denied", peer.failure("secret"));
    seen.put("throttled", peer.failure("throttled"));
    Thread.sleep((long) (Double.parseDouble(env.get("IDLE_SECONDS")) * 1000));
    seen.put("token_id_after_idling", peer.issue("invoices").getId());
    System.out.println(new Gson().toJson(seen));
    channel.shutdownNow();
  }
}
