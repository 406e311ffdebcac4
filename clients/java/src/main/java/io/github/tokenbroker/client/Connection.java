package io.github.tokenbroker.client;

import com.google.gson.Gson;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.netty.shaded.io.grpc.netty.GrpcSslContexts;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.netty.buffer.ByteBufAllocator;
import io.grpc.netty.shaded.io.netty.handler.ssl.ApplicationProtocolNegotiator;
import io.grpc.netty.shaded.io.netty.handler.ssl.SslContext;
import io.grpc.netty.shaded.io.netty.handler.ssl.SslContextBuilder;
import io.grpc.netty.shaded.io.netty.handler.ssl.SslProvider;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import javax.net.ssl.SSLEngine;
import javax.net.ssl.SSLException;
import javax.net.ssl.SSLSessionContext;

/** How the broker is reached. Files that are null are not used. */
record Connection(String address, Path ca, Path certificate, Path privateKey, Path tokenFile) {

  ManagedChannel open() {
    var plain = ca == null && certificate == null && privateKey == null && local();
    var target = address.startsWith("unix:") ? address : "dns:///" + address;
    ManagedChannelBuilder<?> channel = plain
        ? Grpc.newChannelBuilder(target, InsecureChannelCredentials.create())
        : NettyChannelBuilder.forTarget(target).sslContext(new FreshContext(context()));
    return channel.defaultServiceConfig(serviceConfig()).userAgent("token-broker-client-java")
        .keepAliveTime(30, TimeUnit.SECONDS).keepAliveTimeout(10, TimeUnit.SECONDS).build();
  }

  /** What proves the caller to the broker besides a certificate, or null. */
  BearerToken bearer() {
    return tokenFile == null ? null : new BearerToken(() -> "Bearer " + Files.readString(tokenFile).strip());
  }

  private boolean local() {
    return address.startsWith("unix:") || address.matches("(localhost|127(\\.\\d+){3}|\\[::1]):\\d+");
  }

  private static Map<String, ?> serviceConfig() {
    try (var file = Connection.class.getResourceAsStream("service_config.json")) {
      return new Gson().<Map<String, ?>>fromJson(new InputStreamReader(file, StandardCharsets.UTF_8), Map.class);
    } catch (IOException e) {
      throw new UncheckedIOException(e);
    }
  }

  private SslContext context() {
    if ((certificate == null) != (privateKey == null)) {
      throw new IllegalArgumentException("certificate and privateKey go together");
    }
    try {
      var builder = GrpcSslContexts.configure(SslContextBuilder.forClient(), SslProvider.JDK);
      if (ca != null) {
        builder.trustManager(ca.toFile());
      }
      if (certificate != null) {
        builder.keyManager(certificate.toFile(), privateKey.toFile());
      }
      return builder.build();
    } catch (SSLException | IllegalArgumentException e) {
      var cause = e.getCause() == null ? "" : ": " + e.getCause().getMessage();
      throw new IllegalArgumentException("TLS to " + address + ": " + e.getMessage() + cause, e);
    }
  }

  /** Makes each connection with the files of that moment. */
  private final class FreshContext extends SslContext {
    private final SslContext first;

    FreshContext(SslContext first) {
      this.first = first;
    }

    @Override
    public SSLEngine newEngine(ByteBufAllocator allocator) {
      return context().newEngine(allocator);
    }

    @Override
    public SSLEngine newEngine(ByteBufAllocator allocator, String host, int port) {
      return context().newEngine(allocator, host, port);
    }

    @Override
    public boolean isClient() {
      return true;
    }

    @Override
    public List<String> cipherSuites() {
      return first.cipherSuites();
    }

    @Override
    @SuppressWarnings("deprecation") // there is no other
    public ApplicationProtocolNegotiator applicationProtocolNegotiator() {
      return first.applicationProtocolNegotiator();
    }

    @Override
    public SSLSessionContext sessionContext() {
      return first.sessionContext();
    }
  }
}
