-- Restarts the leases of claims; the first time, the claim becomes a run. Ends jobs whose deadline has passed or whose
-- client is gone. Only the job's engine may renew: XCLAIM would hand the entry to any consumer that asks.
--
-- args: consumer, claims as [id, epoch] pairs, orphan_ms
-- returns: indices, from 0, of the claims that are lost

local consumer, now, lost = args.consumer, now_ms(), {}
for i, claim in ipairs(args.claims) do
  local id, epoch = unpack(claim)
  local record = read_record(id)
  local held = record and record.state == 'running' and record.epoch == epoch and record.engine == consumer
  if record == false then
    fail_unreadable(id)
  elseif not held then
    if record and is_live(record.state) then absolve(id, record, epoch, consumer) end
  elseif now >= record.deadline then
    finish(id, 'expired')
  elseif is_orphan(record, now) then
    finish(id, 'cancelled')
  else
    local restart = {'XCLAIM', queue_key(record.priority), GROUP, consumer, 0, record.entry, 'JUSTID'}
    if redis.pcall(unpack(restart)).err then -- maybe the group is missing
      last_delivered(queue_key(record.priority))
      redis.call(unpack(restart))
    end
    if record.confirmed ~= epoch then
      redis.call('HSET', job_key(id), 'runs', record.runs + 1, 'confirmed', epoch)
    end
    held = 'still'
  end
  if held ~= 'still' then table.insert(lost, i - 1) end
end
return lost
