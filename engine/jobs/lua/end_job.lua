-- Ends a queued or running job as cancelled, or from its deadline on as expired.
--
-- args: id, state
-- returns: 1 if this call ended the job, else 0

local id, state = args.id, args.state
local current, deadline = unpack(redis.call('HMGET', job_key(id), 'state', 'deadline'))
if not is_live(current) then return 0 end
if state == 'expired' and now_ms() < tonumber(deadline) then return 0 end
finish(id, state)
return 1
