-- Caches a plan. The oldest give way when all take more than MAX_BYTES.
--
-- args: key, ttl_ms
-- blobs: plan

local MAX_BYTES, CACHED, SUM = 64 * 2 ^ 20, COUNTERS .. ':plans', COUNTERS .. ':plan_bytes'
local function plan_key(key) return PREFIX .. ':plan:' .. key end

local function forget(member)
  local size, key = string.match(member, '^(%d+) (.*)$')
  redis.call('ZREM', CACHED, member)
  redis.call('DEL', plan_key(key))
  return redis.call('DECRBY', SUM, size)
end

local now, member = now_ms(), #ARGV[2] .. ' ' .. args.key
redis.call('SET', plan_key(args.key), ARGV[2], 'PX', args.ttl_ms)
local sum = redis.call('INCRBY', SUM, redis.call('ZADD', CACHED, now + args.ttl_ms, member) * #ARGV[2])
for _, expired in ipairs(redis.call('ZRANGEBYSCORE', CACHED, '-inf', now, 'LIMIT', 0, 16)) do sum = forget(expired) end
while sum > MAX_BYTES do sum = forget(redis.call('ZRANGE', CACHED, 0, 0)[1]) end
for _, key in ipairs({CACHED, SUM}) do redis.call('PEXPIRE', key, args.ttl_ms) end
