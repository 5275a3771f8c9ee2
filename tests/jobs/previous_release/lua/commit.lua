-- Stores the result and ends the job as succeeded.
--
-- args: id, epoch
-- blobs: fields of `result:{id}`: name, value, name, value, ...
-- returns: 1, or 0 if the claim is lost

local id = args.id
if not held_record(id, args.epoch) then return 0 end
redis.call('HSET', result_key(id), unpack(ARGV, 2))
redis.call('PEXPIRE', result_key(id), RESULT_TTL_MS)
finish(id, 'succeeded')
return 1
