-- Puts a running job back in its old place; this run does not count.
--
-- args: consumer, id, epoch
-- returns: 1, or 0 if the claim is lost or another consumer's

local id = args.id
local engine, priority, entry = unpack(redis.call('HMGET', job_key(id), 'engine', 'priority', 'entry'))
if not holds(id, args.epoch) or engine ~= args.consumer then return 0 end
last_delivered(queue_key(priority))
put_back(id, queue_key(priority), entry)
redis.call('HINCRBY', job_key(id), 'runs', -1)
return 1
