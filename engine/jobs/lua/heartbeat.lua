-- Stores an engine's heartbeat for `ttl_ms`.
--
-- args: id, ttl_ms, plans (whether the engine is ready to)
-- blobs: info, metrics

local REMEMBER_MS = 30 * 24 * 3600000
local key = PREFIX .. ':engine:' .. args.id
redis.call('HSET', key, 'info', ARGV[2], 'metrics', ARGV[3])
redis.call('PEXPIRE', key, args.ttl_ms)
redis.call('SADD', PREFIX .. ':engines', args.id)
if args.plans then redis.call('SET', PREFIX .. ':last_engine', ARGV[2], 'PX', REMEMBER_MS) end
hear(now_ms())
