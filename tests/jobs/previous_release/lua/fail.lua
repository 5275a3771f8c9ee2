-- Ends the job as failed.
--
-- args: id, epoch
-- blobs: error
-- returns: 1, or 0 if the claim is lost

if not held_record(args.id, args.epoch) then return 0 end
finish(args.id, 'failed', ARGV[2])
return 1
