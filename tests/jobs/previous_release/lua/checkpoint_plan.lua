-- Stores the plan of one image for later runs of the job.
--
-- args: id, epoch, index
-- blobs: plan
-- returns: 1, or 0 if the claim is lost

if not holds(args.id, args.epoch) then return 0 end
redis.call('HSET', plans_key(args.id), args.index, ARGV[2])
return 1
