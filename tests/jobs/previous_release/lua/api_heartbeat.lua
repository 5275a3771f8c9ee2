-- Notes that an API process lives.
--
-- args: id

local now = now_ms()
redis.call('ZADD', APIS, now, args.id)
redis.call('ZREMRANGEBYSCORE', APIS, '-inf', now - FORGET_MS)
redis.call('PEXPIRE', APIS, FORGET_MS)
hear(now)
