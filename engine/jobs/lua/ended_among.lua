-- Finds the jobs that have ended among many; ends those whose deadline has passed.
--
-- args: ids
-- returns: [id, state, ...] of those that have ended, with an empty state where the job is not known

local now, ended = now_ms(), {}
for _, id in ipairs(args.ids) do
  local record = read_record(id)
  local state = record and record.state
  if record == false then
    fail_unreadable(id)
    state = 'failed'
  elseif is_live(state) and now >= record.deadline then
    finish(id, 'expired')
    state = 'expired'
  end
  if not is_live(state) then
    table.insert(ended, id)
    table.insert(ended, state or '')
  end
end
return ended
