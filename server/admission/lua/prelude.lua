-- Put before every script of this folder.
--
--   rate:{owner}         sorted set, one ticket per request, by its time; expires a minute after the last one
--   quota:{owner}:{day}  pixel-steps charged on that day (days since the epoch, UTC); expires with the day
--   tickets:{owner}      sorted set as `rate`, of refunds of `quota` as refund:{ticket}, and without a limit per minute
--                        of charges to it as {ticket}: the Redis client repeats a call whose reply was lost, for less
--                        than a minute
--
-- Times are milliseconds of Redis' clock. The first write of a script that charges is one that Redis refuses when it is
-- out of memory, so a script is not stopped half way.
--
-- Arguments: ARGV[1] is a JSON object of named scalars, here `args`; None is left out and reads as nil.

local args = cjson.decode(ARGV[1])
local RATE, TICKETS = args.prefix .. ':rate:' .. args.owner, args.prefix .. ':tickets:' .. args.owner
local MINUTE_MS, DAY_MS = 60000, 86400000
local function quota_key(day) return args.prefix .. ':quota:' .. args.owner .. ':' .. day end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Adds a member to a set of the last minute.
local function add(key, member, now)
  redis.call('ZADD', key, now, member)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.0f', now - MINUTE_MS))
  redis.call('PEXPIRE', key, MINUTE_MS)
end
