"""The HTTP side: it checks requests, hands them to the queue and waits for what the engines make of them. No torch."""
