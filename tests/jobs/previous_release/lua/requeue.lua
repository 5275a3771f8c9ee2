-- Puts a running job back in its old place; this run does not count.
--
-- args: consumer, id, epoch
-- returns: 1, or 0 if the claim is lost or another consumer's

local id = args.id
local record = held_record(id, args.epoch)
if not record or record.engine ~= args.consumer then return 0 end
last_delivered(queue_key(record.priority))
put_back(id, queue_key(record.priority), record.entry)
if record.confirmed == record.epoch then redis.call('HINCRBY', job_key(id), 'runs', -1) end
return 1
