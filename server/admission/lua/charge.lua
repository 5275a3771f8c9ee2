-- Counts a job against the limits of its owner; counts nothing if it would exceed one. A repeated call, after a lost
-- reply, finds its ticket and returns what the first did.
--
-- args: owner, ticket, pixel_steps, per_minute?, per_day?
-- returns: [exceeded limit: '' | 'rate' | 'quota', requests left, ms until the oldest request of the minute no longer
--   counts, ms until none does, pixel-steps charged today before this, day, ms left of it]

local per_minute, per_day = args.per_minute, args.per_day
local now = now_ms()
local charged_at = redis.call('ZSCORE', per_minute and RATE or TICKETS, args.ticket)
local day, day_left = math.floor((charged_at or now) / DAY_MS), DAY_MS - now % DAY_MS
local since, used, oldest, newest = '(' .. string.format('%.0f', now - MINUTE_MS), 0, now, now
if per_minute then
  used = redis.call('ZCOUNT', RATE, since, '+inf')
  local first = redis.call('ZRANGEBYSCORE', RATE, since, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local last = redis.call('ZREVRANGE', RATE, 0, 0, 'WITHSCORES')
  if used > 0 then oldest, newest = tonumber(first[2]), tonumber(last[2]) end
end
local charged = per_day and tonumber(redis.call('GET', quota_key(day)) or 0) or 0

local function reply(exceeded, left, newest)
  return {exceeded, left, oldest + MINUTE_MS - now, newest + MINUTE_MS - now, charged, day, day_left}
end
if charged_at then return reply('', per_minute and math.max(0, per_minute - used) or 0, newest) end
if per_minute and used >= per_minute then return reply('rate', 0, newest) end
if per_day and charged + args.pixel_steps > per_day then
  return reply('quota', per_minute and per_minute - used or 0, newest)
end

if per_minute then add(RATE, args.ticket, now) end
if per_day then
  redis.call('INCRBY', quota_key(day), args.pixel_steps)
  redis.call('PEXPIRE', quota_key(day), day_left)
  if not per_minute then add(TICKETS, args.ticket, now) end
end
return reply('', per_minute and per_minute - used - 1 or 0, now)
