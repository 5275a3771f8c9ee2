-- returns: [waiting, running, source bytes, dead-lettered, bytes kept]

return {
  redis.call('ZCARD', WAITING), redis.call('SCARD', RUNNING),
  tonumber(redis.call('HGET', COUNTERS, 'source_bytes') or 0), tonumber(redis.call('HGET', COUNTERS, 'given_up') or 0),
  tonumber(redis.call('HGET', KEPT_TOTAL, 'bytes') or 0)}
