-- Caches a plan. The oldest give way when all take more than `max_bytes`, or that part of Redis' `maxmemory`.
--
-- args: key, ttl_ms, max_bytes, part
-- blobs: plan

local CACHED, SUM = COUNTERS .. ':plans', COUNTERS .. ':plan_bytes'
local function plan_key(key) return PREFIX .. ':plan:' .. key end

local BESIDE = 384 -- bytes of a plan in CACHED and in tables of keys, measured

local function forget(member)
  local size, key = string.match(member, '^(%d+) (.*)$')
  redis.call('ZREM', CACHED, member)
  redis.call('DEL', plan_key(key))
  return redis.call('DECRBY', SUM, size)
end

redis.call('SET', plan_key(args.key), ARGV[2], 'PX', args.ttl_ms)
local now, bytes = now_ms(), memory_usage(plan_key(args.key)) + BESIDE
local maximum = tonumber(string.match(redis.call('INFO', 'memory'), '\nmaxmemory:(%d+)')) or 0
local max_bytes = maximum > 0 and math.min(args.max_bytes, maximum * args.part) or args.max_bytes
local sum = redis.call('INCRBY', SUM, redis.call('ZADD', CACHED, now + args.ttl_ms, bytes .. ' ' .. args.key) * bytes)
for _, expired in ipairs(redis.call('ZRANGEBYSCORE', CACHED, '-inf', now, 'LIMIT', 0, 16)) do sum = forget(expired) end
while sum > max_bytes do sum = forget(redis.call('ZRANGE', CACHED, 0, 0)[1]) end
for _, key in ipairs({CACHED, SUM}) do redis.call('PEXPIRE', key, args.ttl_ms) end
