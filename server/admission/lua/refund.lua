-- Takes a charge back.
--
-- args: owner, ticket, pixel_steps, day

local quota = quota_key(args.day)
redis.call('ZREM', RATE, args.ticket)
local charged = tonumber(redis.call('GET', quota) or 0)
if charged > 0 then redis.call('DECRBY', quota, string.format('%.0f', math.min(charged, args.pixel_steps))) end
