-- Ends a queued or running job as cancelled, or from its deadline on as expired.
--
-- args: id, state
-- returns: 1 if this call ended the job, else 0

local id, state = args.id, args.state
local record = read_record(id)
if record == false then
  fail_unreadable(id)
  return 0
end
if not record or not is_live(record.state) then return 0 end
if state == 'expired' and now_ms() < record.deadline then return 0 end
finish(id, state)
return 1
