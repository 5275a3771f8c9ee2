import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.Base64;

/**
 * Sends requests with the JDK's client as it comes: over http:// it offers an upgrade to HTTP/2.
 *
 * A line of standard input is a request: method, URL, key, content type, body as base64, and how the body is sent:
 * "whole", "stream" (of unknown length) or "continue". A line of standard output is status and body, as base64.
 */
class Requests {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = lines.readLine()) != null; ) {
            var response = client.send(request(line.split(" ", -1)), BodyHandlers.ofByteArray());
            System.out.println(response.statusCode() + " " + Base64.getEncoder().encodeToString(response.body()));
        }
    }

    private static HttpRequest request(String[] words) {
        byte[] body = Base64.getDecoder().decode(words[4]);
        BodyPublisher whole = BodyPublishers.ofByteArray(body);
        BodyPublisher sent = switch (words[5]) {
            case "stream" -> BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body));
            default -> body.length == 0 ? BodyPublishers.noBody() : whole;
        };
        var builder = HttpRequest.newBuilder(URI.create(words[1])).method(words[0], sent);
        builder.header("Authorization", "Bearer " + words[2]).expectContinue(words[5].equals("continue"));
        if (body.length > 0) builder.header("Content-Type", words[3].replace("%20", " "));
        return builder.build();
    }
}
