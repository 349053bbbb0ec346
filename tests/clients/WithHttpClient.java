import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** One call with Java's HttpClient, which offers h2c by default: `java WithHttpClient.java URL BODY [expect]`. */
class WithHttpClient {
    public static void main(String[] args) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(args[0]))
            .header("Content-Type", "application/json")
            .expectContinue(args.length > 2)
            .POST(HttpRequest.BodyPublishers.ofString(args[1]))
            .build();
        var reply = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        var outcome = reply.headers().firstValue("x-gateway-outcome").orElse("");
        System.out.println(reply.statusCode() + " " + outcome + " " + reply.body());
    }
}
