package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonElement;
import com.google.gson.JsonParser;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;

/** The stage of the tests: a broker and a resource server, worked by HTTP at STAGE_URL. */
final class Stage {
  static final HttpClient HTTP = HttpClient.newHttpClient();
  private static final Duration PATIENCE = Duration.ofSeconds(30);

  private Stage() {}

  static URI url(String path) {
    return URI.create(System.getenv("STAGE_URL") + path);
  }

  static JsonElement get(String path) throws Exception {
    return answer(HttpRequest.newBuilder(url(path)).build());
  }

  static JsonElement post(String path) throws Exception {
    return answer(HttpRequest.newBuilder(url(path)).POST(BodyPublishers.noBody()).build());
  }

  private static JsonElement answer(HttpRequest request) throws Exception {
    var response = HTTP.send(request, BodyHandlers.ofString());
    assertEquals(200, response.statusCode(), () -> request + ": " + response.body());
    return JsonParser.parseString(response.body());
  }

  /** How many calls the broker has got, by method. */
  static Map<String, Integer> calls() throws Exception {
    return numbers("/calls");
  }

  static int calls(String method) throws Exception {
    return calls().getOrDefault(method, 0);
  }

  static Map<String, Integer> numbers(String path) throws Exception {
    return get(path).getAsJsonObject().entrySet().stream().collect(Collectors.toMap(Map.Entry::getKey, e -> e.getValue().getAsInt()));
  }

  /** Asks again until the answer is yes. */
  static void until(String what, Callable<Boolean> done) throws Exception {
    var end = System.nanoTime() + PATIENCE.toNanos();
    while (!done.call()) {
      assertTrue(System.nanoTime() < end, "still not so: " + what);
      Thread.sleep(20);
    }
  }
}
