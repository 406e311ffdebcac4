#!lua flags=no-writes
-- look returns the record: nothing of it if its stamp is the caller's; no sealed
-- value that the caller has, which it tells by the registers that it knows; and
-- of the access tokens only one, if it is named.
--
-- arg: stamp, only (a field, or ''), and registers by field.
loadAll()
if arg.stamp ~= '' and arg.stamp == stamp then return reply('SAME') end
local out = {}
for field, value in pairs(H) do
  local kind = string.match(field, '^(%a):')
  local elsewhere = kind == 'a' and arg.only ~= '' and field ~= arg.only
  if kind ~= 'q' and kind ~= 'x' and not elsewhere and isNews(field) then out[field] = value end
end
return reply('OK', out)
