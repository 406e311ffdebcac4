package io.github.tokenbroker.client;

import java.io.IOException;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.Optional;

/**
 * Sends requests with a source's token. A request that gets 401 is sent once more, with the successor, if there is one and
 * the body can be sent again: its length is known beforehand, as it is but with {@code BodyPublishers.ofInputStream},
 * {@code ofByteArrays} and publishers of your own without a length. Then the answer is yours whatever it is.
 *
 * <p>The client must not follow redirects (by default it does not), or the token would go wherever they lead.
 */
public final class TokenHttpClient {
  private final HttpClient client;
  private final TokenSource source;

  /**
   * Uses a source, which stays the caller's to close.
   *
   * @throws IllegalArgumentException if the client follows redirects
   */
  public TokenHttpClient(HttpClient client, TokenSource source) {
    if (client.followRedirects() != HttpClient.Redirect.NEVER) {
      throw new IllegalArgumentException("the client follows redirects, and would take the token along: build it with Redirect.NEVER");
    }
    this.client = client;
    this.source = source;
  }

  /** Sends a request, as {@link HttpClient#send} does. Throws {@link TokenBrokerException} if there is no token. */
  public <T> HttpResponse<T> send(HttpRequest request, HttpResponse.BodyHandler<T> handler) throws IOException, InterruptedException {
    var token = source.token();
    var response = client.send(with(token, request), handler);
    if (response.statusCode() != 401) {
      return response;
    }
    var successor = successor(token);
    var repeatable = request.bodyPublisher().map(body -> body.contentLength() >= 0).orElse(true);
    if (successor.isEmpty() || !repeatable) {
      return response;
    }
    if (response.body() instanceof AutoCloseable body) {
      close(body);
    }
    return client.send(with(successor.get(), request), handler);
  }

  /** A report that fails leaves the user with the 401. */
  private Optional<Token> successor(Token token) {
    try {
      return source.rejected(token);
    } catch (TokenBrokerException e) {
      return Optional.empty();
    }
  }

  private static HttpRequest with(Token token, HttpRequest request) {
    return HttpRequest.newBuilder(request, (name, value) -> !name.equalsIgnoreCase("Authorization"))
        .header("Authorization", token.authorization()).build();
  }

  private static void close(AutoCloseable body) throws IOException {
    try {
      body.close();
    } catch (IOException | RuntimeException e) {
      throw e;
    } catch (Exception e) {
      throw new IOException(e);
    }
  }
}
