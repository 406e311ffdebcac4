package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonParser;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.net.Authenticator;
import java.net.CookieHandler;
import java.net.ProxySelector;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.time.Instant;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLParameters;
import org.junit.jupiter.api.Test;

/** What happens when a resource server refuses tokens. */
class TokenHttpClientTest {
  /** The first n requests wait for each other: all have the same token. */
  private static final class Together extends HttpClient {
    private final CyclicBarrier barrier;
    private final AtomicInteger first;

    Together(int n) {
      barrier = new CyclicBarrier(n);
      first = new AtomicInteger(n);
    }

    @Override
    public <T> HttpResponse<T> send(HttpRequest request, HttpResponse.BodyHandler<T> handler) throws IOException, InterruptedException {
      if (first.getAndDecrement() > 0) {
        try {
          barrier.await(20, TimeUnit.SECONDS);
        } catch (java.util.concurrent.BrokenBarrierException | java.util.concurrent.TimeoutException e) {
          throw new IOException(e);
        }
      }
      return Stage.HTTP.send(request, handler);
    }

    @Override
    public <T> CompletableFuture<HttpResponse<T>> sendAsync(HttpRequest request, HttpResponse.BodyHandler<T> handler) {
      throw new UnsupportedOperationException();
    }

    @Override
    public <T> CompletableFuture<HttpResponse<T>> sendAsync(
        HttpRequest request, HttpResponse.BodyHandler<T> handler, HttpResponse.PushPromiseHandler<T> push) {
      throw new UnsupportedOperationException();
    }

    @Override
    public Optional<CookieHandler> cookieHandler() {
      return Optional.empty();
    }

    @Override
    public Optional<Duration> connectTimeout() {
      return Optional.empty();
    }

    @Override
    public Redirect followRedirects() {
      return Redirect.NEVER;
    }

    @Override
    public Optional<ProxySelector> proxy() {
      return Optional.empty();
    }

    @Override
    public SSLContext sslContext() {
      return Stage.HTTP.sslContext();
    }

    @Override
    public SSLParameters sslParameters() {
      return Stage.HTTP.sslParameters();
    }

    @Override
    public Optional<Authenticator> authenticator() {
      return Optional.empty();
    }

    @Override
    public Version version() {
      return Version.HTTP_1_1;
    }

    @Override
    public Optional<Executor> executor() {
      return Optional.empty();
    }
  }

  /** What a request got. */
  private record Answer(int status, String tokenId) {}

  private static List<Answer> twenty(TokenSource source) throws Exception {
    var client = new TokenHttpClient(new Together(20), source);
    return TokenSourceTest.atOnce(20, () -> send(client, BodyPublishers.ofString("some body")));
  }

  private static Answer send(TokenHttpClient client, HttpRequest.BodyPublisher body) throws Exception {
    var response = client.send(HttpRequest.newBuilder(Stage.url("/resource")).POST(body).build(), BodyHandlers.ofString());
    var answer = JsonParser.parseString(response.body()).getAsJsonObject();
    assertEquals(9, answer.get("body_length").getAsInt());
    return new Answer(response.statusCode(), answer.get("token_id").getAsString());
  }

  /** What has happened so far. */
  private record Count(int reported, int accepted, int refused) {
    static Count now() throws Exception {
      var resource = Stage.numbers("/resource/calls");
      return new Count(Stage.calls("RefreshToken"), resource.get("accepted"), resource.get("refused"));
    }

    Count since(Count before) {
      return new Count(reported - before.reported, accepted - before.accepted, refused - before.refused);
    }
  }

  /** Waits until the broker takes a report of the token. */
  private static Token grownUp(TokenSource source) throws Exception {
    var token = source.token();
    Stage.until("the token is 10 s old", () -> Instant.now().isAfter(token.issueTime().plusMillis(10_200)));
    return source.token();
  }

  @Test
  void theTokenFollowsNoRedirect() {
    try (var source = TokenSource.of("invoices")) {
      var client = HttpClient.newBuilder().followRedirects(HttpClient.Redirect.NORMAL).build();
      assertThrows(IllegalArgumentException.class, () -> new TokenHttpClient(client, source));
    }
  }

  @Test
  void aRefusedTokenIsReportedOnce() throws Exception {
    try (var source = TokenSource.of("report1"); var other = TokenSource.of("report2"); var third = TokenSource.of("report3")) {
      other.token();
      third.token();
      var old = grownUp(source);
      twenty(source);
      Stage.post("/resource/refuse?tokens=seen");
      var before = Count.now();
      var answers = twenty(source);
      assertTrue(answers.stream().allMatch(a -> a.status() == 200 && !a.tokenId().equals(old.id())), answers::toString);
      assertEquals(new Count(1, 20, 20), Count.now().since(before));
      assertEquals(answers.get(0).tokenId(), source.rejected(old).orElseThrow().id(), "an old report gets the token at hand");
      assertEquals(new Count(1, 20, 20), Count.now().since(before));

      Stage.post("/resource/refuse?tokens=all");
      var young = Count.now();
      assertTrue(twenty(source).stream().allMatch(a -> a.status() == 401));
      assertEquals(new Count(0, 0, 20), Count.now().since(young), "a young token is not reported");

      grownUp(other);
      assertTrue(twenty(other).stream().allMatch(a -> a.status() == 401));
      assertEquals(new Count(1, 0, 60), Count.now().since(young), "one report, two requests each");

      grownUp(third);
      var once = Count.now();
      var client = new TokenHttpClient(Stage.HTTP, third);
      var stream = BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(new byte[9]));
      assertEquals(401, send(client, stream).status());
      assertEquals(new Count(1, 0, 1), Count.now().since(once), "a body of unknown length is reported, and not sent again");
      Stage.post("/resource/refuse?tokens=none");
    }
  }
}
