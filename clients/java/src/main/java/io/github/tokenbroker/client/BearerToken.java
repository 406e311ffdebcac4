package io.github.tokenbroker.client;

import io.grpc.CallCredentials;
import io.grpc.Grpc;
import io.grpc.Metadata;
import io.grpc.SecurityLevel;
import io.grpc.Status;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.util.concurrent.Executor;

/**
 * Adds a source's token to each call of a gRPC stub: {@code stub.withCallCredentials(new BearerToken(source))}. It is sent
 * over TLS only, and without it to this machine.
 */
public final class BearerToken extends CallCredentials {
  private static final Metadata.Key<String> AUTHORIZATION = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  /** What is sent, asked for each call. */
  @FunctionalInterface
  interface Header {
    String value() throws IOException;
  }

  private final Header header;

  /** Uses a source, which stays the caller's to close. */
  public BearerToken(TokenSource source) {
    this(() -> source.token().authorization());
  }

  BearerToken(Header header) {
    this.header = header;
  }

  @Override
  public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
    var peer = call.getTransportAttrs().get(Grpc.TRANSPORT_ATTR_REMOTE_ADDR);
    var far = peer == null || peer instanceof InetSocketAddress a && !a.getAddress().isLoopbackAddress();
    if (far && call.getSecurityLevel() != SecurityLevel.PRIVACY_AND_INTEGRITY) {
      applier.fail(Status.UNAUTHENTICATED.withDescription("a bearer token is not sent without TLS: use a TLS channel"));
      return;
    }
    executor.execute(() -> {
      try {
        var headers = new Metadata();
        headers.put(AUTHORIZATION, header.value());
        applier.apply(headers);
      } catch (TokenBrokerException e) {
        applier.fail(Status.fromCode(e.code()).withDescription(e.getMessage()).withCause(e));
      } catch (IOException | RuntimeException e) { // somebody may be replacing the file
        applier.fail(Status.UNAVAILABLE.withDescription(e.toString()).withCause(e));
      }
    });
  }
}
