-- Takes a charge back, once per ticket.
--
-- args: owner, ticket, pixel_steps, day, keep_request?

local quota, refund = quota_key(args.day), 'refund:' .. args.ticket
if not args.keep_request then redis.call('ZREM', RATE, args.ticket) end
local charged = tonumber(redis.call('GET', quota) or 0)
if charged > 0 and not redis.call('ZSCORE', TICKETS, refund) then
  redis.call('DECRBY', quota, string.format('%.0f', math.min(charged, args.pixel_steps)))
  add(TICKETS, refund, now_ms())
end
