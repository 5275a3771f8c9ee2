-- Restarts the leases of claims; ends jobs whose deadline has passed. Only the job's engine may renew: XCLAIM would
-- hand the entry to any consumer that asks.
--
-- args: consumer, claims as [id, epoch] pairs
-- returns: indices, from 0, of the claims that are lost

local consumer, now, lost = args.consumer, now_ms(), {}
for i, claim in ipairs(args.claims) do
  local id, epoch = unpack(claim)
  local engine, deadline, priority, entry = unpack(
    redis.call('HMGET', job_key(id), 'engine', 'deadline', 'priority', 'entry'))
  if not holds(id, epoch) or engine ~= consumer then
    table.insert(lost, i - 1)
  elseif now >= tonumber(deadline) then
    finish(id, 'expired')
    table.insert(lost, i - 1)
  else
    last_delivered(queue_key(priority))
    redis.call('XCLAIM', queue_key(priority), GROUP, consumer, 0, entry, 'JUSTID')
  end
end
return lost
