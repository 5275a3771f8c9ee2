"""The queue's scripts before stages, as engines and APIs of that release run them."""
