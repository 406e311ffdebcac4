package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.Status.Code;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.Callable;
import java.util.concurrent.Executors;
import org.junit.jupiter.api.Test;

/** What the source does at a real broker, over mTLS. The tests share the stage: one at a time. */
class TokenSourceTest {
  static String id(TokenSource source) {
    return source.token().id();
  }

  /** The token that is at hand, without any wait. */
  private static String atHand(TokenSource source) {
    return source.token(Duration.ZERO).id();
  }

  /** Asks for some time: the token at hand is good enough for everybody. */
  private static void stays(TokenSource source, String id) throws Exception {
    for (var end = Instant.now().plusMillis(500); Instant.now().isBefore(end); Thread.sleep(1)) {
      assertEquals(id, atHand(source));
    }
  }

  static TokenBrokerException error(TokenSource source) {
    return assertThrows(TokenBrokerException.class, source::token);
  }

  /** Runs all at once and returns what they return. */
  static <T> List<T> atOnce(int n, Callable<T> call) throws Exception {
    var threads = Executors.newFixedThreadPool(n);
    try {
      var results = new ArrayList<T>();
      for (var f : threads.invokeAll(java.util.Collections.nCopies(n, call))) {
        results.add(f.get());
      }
      return results;
    } finally {
      threads.shutdownNow();
    }
  }

  @Test
  void aMillionTokensAreOneCall() throws Exception {
    var before = Stage.calls();
    try (var source = TokenSource.of("invoices")) {
      var first = id(source);
      var began = System.nanoTime();
      for (var i = 0; i < 1_000_000; i++) {
        assertEquals(first, source.token().id());
      }
      System.out.println("1,000,000 tokens in " + Duration.ofNanos(System.nanoTime() - began));
      var after = Stage.calls();
      for (var want : Map.of("WatchToken", 1, "IssueToken", 0, "RefreshToken", 0).entrySet()) {
        var method = want.getKey();
        assertEquals(want.getValue(), after.getOrDefault(method, 0) - before.getOrDefault(method, 0), method);
      }
    }
  }

  @Test
  void askedAtOnceByManyItMakesOneCall() throws Exception {
    var before = Stage.calls("WatchToken");
    try (var source = TokenSource.of("invoices")) {
      assertEquals(1, atOnce(50, () -> id(source)).stream().distinct().count());
      assertEquals(1, Stage.calls("WatchToken") - before);
    }
  }

  @Test
  void aSuccessorArrives() throws Exception {
    try (var source = TokenSource.of("invoices")) {
      var first = id(source);
      assertEquals(first, Stage.post("/revoke").getAsJsonObject().get("token_id").getAsString());
      Stage.until("a successor", () -> !id(source).equals(first));
    }
  }

  @Test
  void theBrokerGoesAwayAndComesBack() throws Exception {
    try (var source = TokenSource.of("invoices"); var late = TokenSource.of("invoices")) {
      for (var end : List.of("/broker/stop", "/broker/kill")) {
        var first = id(source);
        Stage.post(end);
        stays(source, first);
        try (var other = TokenSource.of("invoices")) {
          assertEquals(Code.UNAVAILABLE, error(other).code());
        }
        Stage.post("/broker/start"); // with nothing in its memory
        Stage.until("the token of the new broker", () -> !atHand(source).equals(first));
        var second = id(source);
        Stage.post("/revoke");
        Stage.until("a successor from the new broker", () -> !id(source).equals(second));
      }
      id(late);
    }
  }

  @Test
  void whoAsksWhileTheBrokerIsAwayGetsTheTokenWhenItIsBack() throws Exception {
    try (var source = TokenSource.of("invoices")) {
      Stage.post("/broker/stop");
      for (var i = 0; i < 3; i++) {
        assertEquals(Code.UNAVAILABLE, error(source).code());
      }
      Stage.post("/broker/start");
      Stage.until("a token", () -> {
        try {
          return source.token() != null;
        } catch (TokenBrokerException e) {
          return false;
        }
      });
    }
  }

  @Test
  void aNewCertificateIsUsed() throws Exception {
    try (var source = TokenSource.of("invoices")) {
      var first = id(source);
      var seen = Stage.get("/callers").getAsJsonArray().size();
      Stage.post("/broker/stop");
      Stage.post("/certificate?as=worker2");
      Stage.post("/broker/start"); // with nothing in its memory
      Stage.until("the token of the new broker", () -> !atHand(source).equals(first));
      Stage.post("/broker/stop"); // a stream has its line in the audit log when it ends
      var callers = Stage.get("/callers").getAsJsonArray().asList();
      Stage.post("/certificate?as=worker");
      Stage.post("/broker/start");
      assertTrue(callers.subList(seen, callers.size()).toString().contains("\"spiffe://clients.test/worker2\""), callers::toString);
    }
  }

  @Test
  void filesThatWereGoodAreUsedWhileTheyAreNot() throws Exception {
    var certificate = Path.of(System.getenv("BROKER_CERTIFICATE"));
    var ca = Path.of(certificate + ".ca");
    Files.copy(Path.of(System.getenv("BROKER_CA")), ca);
    var builder = TokenSource.builder("invoices").ca(ca);
    try (var source = builder.build()) {
      id(source);
      var was = List.of(Files.readAllBytes(certificate), Files.readAllBytes(ca));
      for (var spoil : List.of("missing", "half written", "no authority", "of another pair")) {
        Stage.post("/broker/stop");
        switch (spoil) {
          case "missing" -> Files.delete(certificate);
          case "half written" -> Files.write(certificate, java.util.Arrays.copyOf(was.get(0), was.get(0).length - 40));
          case "no authority" -> Files.writeString(ca, "");
          default -> {
            Stage.post("/certificate?as=worker2");
            Files.write(certificate, was.get(0));
          }
        }
        var e = assertThrows(IllegalArgumentException.class, builder::build, spoil);
        assertTrue(e.getMessage().contains((spoil.equals("no authority") ? ca : certificate).toString()), e.getMessage());
        var before = Stage.calls("WatchToken");
        Stage.post("/broker/start");
        Stage.until("the stream is back: " + spoil, () -> Stage.calls("WatchToken") > before);
        Files.write(certificate, was.get(0));
        Files.write(ca, was.get(1));
      }
    } finally {
      Stage.post("/certificate?as=worker");
    }
  }

  @Test
  void aDeniedProfileIsNotHammered() throws Exception {
    var before = Stage.calls("WatchToken");
    try (var source = TokenSource.of("secret")) {
      var began = System.nanoTime();
      for (var i = 0; i < 1000; i++) {
        var e = error(source);
        assertEquals(List.of(Code.PERMISSION_DENIED, "CALLER_DENIED", Optional.empty()), List.of(e.code(), e.reason(), e.retryAfter()));
        assertEquals("secret", e.metadata().get("profile"));
        assertEquals("spiffe://clients.test/worker", e.metadata().get("caller"));
      }
      var took = Duration.ofNanos(System.nanoTime() - began);
      assertTrue(took.toSeconds() < 5, "1000 errors took " + took);
      // The first wait is 50 ms or more, and the next ones are longer.
      var made = Stage.calls("WatchToken") - before;
      assertTrue(made <= Math.min(6, 1 + took.toMillis() / 50), made + " calls in " + took);
      Stage.until("it tries again when asked after the wait", () -> {
        error(source);
        return Stage.calls("WatchToken") - before > made;
      });
    }
  }

  @Test
  void aThrottledProfileWaitsAsTold() throws Exception {
    var before = Stage.calls("WatchToken");
    try (var source = TokenSource.of("throttled")) {
      var began = System.nanoTime();
      for (var patience : List.of(Duration.ofSeconds(20), Duration.ofSeconds(20), Duration.ofMillis(300))) {
        var e = assertThrows(TokenBrokerException.class, () -> source.token(patience));
        assertEquals(List.of(Code.RESOURCE_EXHAUSTED, "ENDPOINT_THROTTLED"), List.of(e.code(), e.reason()), e.getMessage());
        var wait = e.retryAfter().orElseThrow().toSeconds();
        assertTrue(wait >= 20 && wait <= 33, "retry after " + wait);
      }
      assertEquals(1, Stage.calls("WatchToken") - before);
      assertTrue(System.nanoTime() - began < 15e9, "it waits in vain");
    }
  }

  @Test
  void theTokenOfAJobThatHasEndedIsOfNoUse() throws Exception {
    try (var source = TokenSource.builder("invoices").job("nightly", true).build()) {
      assertEquals(id(source), Stage.post("/revoke?job=nightly").getAsJsonObject().get("token_id").getAsString());
      Stage.until("an error", () -> {
        try {
          source.token();
          return false;
        } catch (TokenBrokerException e) {
          return e.reason().equals("JOB_ENDED");
        }
      });
    }
  }

  @Test
  void aRightThatIsWithdrawnLeavesTheToken() throws Exception {
    var before = Stage.calls("WatchToken");
    try (var source = TokenSource.of("invoices"); var other = TokenSource.of("invoices")) {
      var first = id(source);
      Stage.post("/policy?allow=false");
      Stage.until("the source is denied", () -> {
        assertEquals(first, atHand(source));
        return Stage.calls("WatchToken") - before > 2;
      });
      assertEquals("CALLER_DENIED", error(other).reason());
      assertEquals(first, id(source));
      Stage.post("/policy?allow=true");
      Stage.post("/revoke");
      Stage.until("the source follows again", () -> !id(source).equals(first));
    }
  }

  @Test
  void closedItLeavesNothing() throws Exception {
    useOne();
    var threads = followers();
    var sockets = sockets();
    for (var i = 0; i < 20; i++) {
      useOne();
    }
    assertEquals(threads, followers());
    Stage.until("all connections are gone", () -> sockets() <= sockets);
    var source = TokenSource.of("invoices");
    source.close();
    source.close();
    assertThrows(IllegalStateException.class, source::token);
  }

  private static void useOne() {
    try (var source = TokenSource.of("invoices")) {
      id(source);
      assertTrue(followers() > 0);
    }
  }

  private static long followers() {
    return Thread.getAllStackTraces().keySet().stream().filter(t -> t.getName().startsWith("token-broker ")).count();
  }

  private static long sockets() throws Exception {
    var n = 0;
    try (var files = Files.newDirectoryStream(Path.of("/proc/self/fd"))) {
      for (var file : files) {
        try {
          n += Files.readSymbolicLink(file).toString().startsWith("socket:") ? 1 : 0;
        } catch (java.nio.file.NoSuchFileException gone) {
          // the folder's own
        }
      }
    }
    return n;
  }

  @Test
  void nothingShowsTheToken() {
    try (var source = TokenSource.of("invoices")) {
      var token = source.token();
      var shown = token + " " + source + " " + source.rejected(token);
      assertFalse(shown.contains(token.accessToken()), "the token is shown");
      assertTrue(shown.contains(token.id()), shown);
      assertNotEquals("", token.accessToken());
      assertTrue(token.authorization().endsWith(token.accessToken()));
    }
  }
}
