"""Who gets in: keys, limits, room in the queue, engines that work."""
