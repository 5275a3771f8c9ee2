"""The engine. The package itself, `geometry`, `errors` and `jobs` import no torch: the API uses them."""
