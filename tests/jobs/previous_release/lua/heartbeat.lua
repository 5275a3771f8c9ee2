-- Stores an engine's heartbeat for `ttl_ms`.
--
-- args: id, ttl_ms
-- blobs: info, metrics

local key = PREFIX .. ':engine:' .. args.id
redis.call('HSET', key, 'info', ARGV[2], 'metrics', ARGV[3])
redis.call('PEXPIRE', key, args.ttl_ms)
redis.call('SADD', PREFIX .. ':engines', args.id)
hear(now_ms())
