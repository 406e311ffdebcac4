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
import io.grpc.util.CertificateUtils;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.PrivateKey;
import java.security.PublicKey;
import java.security.Signature;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.TimeUnit;
import java.util.logging.Level;
import java.util.logging.Logger;
import java.util.stream.Stream;
import javax.net.ssl.SSLEngine;
import javax.net.ssl.SSLSessionContext;

/** How the broker is reached. Files that are null are not used. */
record Connection(String address, Path ca, Path certificate, Path privateKey, Path tokenFile) {
  private static final Logger LOG = Logger.getLogger(TokenSource.class.getName());

  ManagedChannel open() {
    var plain = ca == null && certificate == null && privateKey == null && local();
    var target = address.startsWith("unix:") ? address : "dns:///" + address;
    ManagedChannelBuilder<?> channel = plain
        ? Grpc.newChannelBuilder(target, InsecureChannelCredentials.create())
        : NettyChannelBuilder.forTarget(target).sslContext(new FreshContext(context()));
    return channel.defaultServiceConfig(serviceConfig()).disableServiceConfigLookUp().proxyDetector(to -> null).userAgent("token-broker-client-java")
        .keepAliveTime(30, TimeUnit.SECONDS).keepAliveTimeout(10, TimeUnit.SECONDS).build();
  }

  /** What proves the caller to the broker besides a certificate, or null. */
  BearerToken bearer() {
    return tokenFile == null ? null : new BearerToken(() -> {
      var token = Files.readString(tokenFile, StandardCharsets.ISO_8859_1).replaceFirst("\\r?\\n\\z", "");
      if (!token.matches("[!-~]+")) {
        throw new IOException(tokenFile + " does not hold one token and nothing else");
      }
      return "Bearer " + token;
    });
  }

  private boolean local() {
    return address.startsWith("unix:") || address.matches("(?i)(localhost|127(\\.\\d+){3}|\\[::1]):\\d+");
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
        builder.trustManager(new ByteArrayInputStream(pem(ca)));
      }
      if (certificate != null) {
        var chain = CertificateUtils.getX509Certificates(new ByteArrayInputStream(pem(certificate)));
        var key = CertificateUtils.getPrivateKey(new ByteArrayInputStream(pem(privateKey)));
        if (!fit(chain[0].getPublicKey(), key)) {
          throw new IllegalArgumentException(certificate + " and " + privateKey + " are not a pair");
        }
        builder.keyManager(key, chain);
      }
      return builder.build();
    } catch (IOException | GeneralSecurityException | RuntimeException e) {
      var cause = e.getCause() == null ? "" : ": " + e.getCause().getMessage();
      var files = Stream.of(ca, certificate, privateKey).filter(Objects::nonNull).toList();
      throw new IllegalArgumentException("TLS to " + address + " with " + files + ": " + e.getMessage() + cause, e);
    }
  }

  /** Reads a file that somebody may be writing. */
  private static byte[] pem(Path file) throws IOException {
    var text = Files.readString(file, StandardCharsets.ISO_8859_1);
    var begun = text.split("-----BEGIN ", -1).length;
    if (begun == 1 || begun != text.split("-----END ", -1).length) {
      throw new IOException(file + " is not a whole PEM file");
    }
    return text.getBytes(StandardCharsets.ISO_8859_1);
  }

  /** Tells whether the public key checks what the private one signs. */
  private static boolean fit(PublicKey open, PrivateKey secret) throws GeneralSecurityException {
    if (!open.getAlgorithm().equals(secret.getAlgorithm())) {
      return false;
    }
    var algorithm = switch (secret.getAlgorithm()) {
      case "RSA" -> "SHA256withRSA";
      case "EC" -> "SHA256withECDSA";
      default -> secret.getAlgorithm();
    };
    var signer = Signature.getInstance(algorithm);
    signer.initSign(secret);
    signer.update((byte) 1);
    var signature = signer.sign();
    signer.initVerify(open);
    signer.update((byte) 1);
    return signer.verify(signature);
  }

  /** Makes each connection with the files as they are at that moment, or last were good. */
  private final class FreshContext extends SslContext {
    private final SslContext first;
    private volatile SslContext good;

    FreshContext(SslContext first) {
      this.first = first;
      good = first;
    }

    private SslContext fresh() {
      try {
        good = context();
      } catch (IllegalArgumentException e) {
        LOG.log(Level.WARNING, "what was read before is used: " + e.getMessage());
      }
      return good;
    }

    @Override
    public SSLEngine newEngine(ByteBufAllocator allocator) {
      return fresh().newEngine(allocator);
    }

    @Override
    public SSLEngine newEngine(ByteBufAllocator allocator, String host, int port) {
      return fresh().newEngine(allocator, host, port);
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
