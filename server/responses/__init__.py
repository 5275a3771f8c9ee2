"""What goes out: answers, events, and the wait for a job."""
