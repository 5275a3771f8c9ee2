-- Finds the jobs that have ended among many; ends those whose deadline has passed.
--
-- args: ids
-- returns: [id, state, ...] of those that have ended, with an empty state where the job is not known

local now, ended = now_ms(), {}
for _, id in ipairs(args.ids) do
  local fields = redis.pcall('HMGET', job_key(id), 'state', 'deadline') -- of many jobs, so no more than needed
  local state, deadline = fields[1], integer(fields[2] or nil)
  if fields.err or not STATES[state or ''] or is_live(state) and (not deadline or now >= deadline) then
    local record = read_record(id)
    if record then finish(id, 'expired') elseif record == false then fail_unreadable(id) end
    state = record and 'expired' or record == false and 'failed'
  end
  if not is_live(state) then
    table.insert(ended, id)
    table.insert(ended, state or '')
  end
end
return ended
