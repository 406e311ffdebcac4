#!lua
-- keep keeps a ticket. Kept again, it stays as it is: it may have been redeemed
-- meanwhile.
--
-- arg: sealed, life (ms).
if redis.call('EXISTS', key) == 0 then
  redis.call('HSET', key, 'sealed', arg.sealed, 'kept', int(now), 'ends', int(now + arg.life))
  redis.call('PEXPIRE', key, arg.life)
end
return reply('OK')
